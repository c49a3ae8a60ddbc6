// Check that an engine's reported accuracy allows it to run, as engines/promises.py does.
//
// Whoever wrote the manifest chose the figures and gates in it. They are compared again here: an engine runs only if its
// figures are there, fit each other and are inside the gate.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "compat.hpp"
#include "manifest.hpp"

namespace edge_backbones::promises {

inline Gate default_gate(Precision precision) {
  Gate gate;
  if (precision == Precision::fp32) gate.max_relative = 1e-3;
  if (precision == Precision::fp16) gate.min_cosine = 0.9999;
  if (precision == Precision::bf16) gate.min_sqnr_db = 27.0;
  if (precision == Precision::int8 || precision == Precision::fp8) gate.min_cosine = 0.98, gate.min_sqnr_db = 15.0;
  return gate;
}

/// Return whether a map of zeros (cosine 0, SQNR 0 dB, relative error 1) is outside a gate.
inline bool refuses_zeros(const Gate& gate) {
  return (gate.min_cosine && *gate.min_cosine > 0) || (gate.min_sqnr_db && *gate.min_sqnr_db > 0) ||
         (gate.max_relative && *gate.max_relative < 1);
}

/// Return whether the figures of one map keep every bound of a gate.
inline bool is_inside(const Gate& gate, double cosine, double sqnr_db, double relative) {
  return (!gate.min_cosine || cosine >= *gate.min_cosine) && (!gate.min_sqnr_db || sqnr_db >= *gate.min_sqnr_db) &&
         (!gate.max_relative || relative <= *gate.max_relative);
}

/// Return the gate that an engine has to keep: that of the bundle's graph of its precision, or the precision's default.
inline Gate gate_of(const Manifest& manifest, const EngineKey& key, const Gate& own) {
  for (const GraphRecord& graph : manifest.graphs) {
    if (graph.precision == key.precision && graph.gate && refuses_zeros(*graph.gate)) return *graph.gate;
  }
  const Flavour* flavour = find_flavour(key.flavour);
  if (flavour != nullptr && !flavour->from_graph && refuses_zeros(own)) return own;
  return default_gate(key.precision);
}

/// Return a phrase for each output outside the gate, with its figures.
inline std::string failures(const std::vector<StageParity>& stages) {
  std::vector<std::string> found;
  for (const StageParity& one : stages) {
    if (one.passed) continue;
    found.push_back(!one.finite ? one.stage + " has values that are not finite"
                                : one.stage + " has cosine " + detail::formatted("%.4f", one.cosine) + ", SQNR " +
                                      detail::formatted("%.1f", one.sqnr_db) + " dB, relative error " +
                                      detail::formatted("%.2e", one.relative) + ", max |difference| " +
                                      detail::formatted("%.3g", one.max_abs));
  }
  return joined(found, "; ");
}

/// Return why an engine's parity report does not let it run, one phrase with a fix; empty if it does.
inline std::vector<std::string> reasons_against(const Manifest& manifest, const EngineRecord& engine) {
  const std::string verify = "run edge-backbones verify on this device", precision = name_of(engine.key.precision);
  const ParityReport& report = engine.parity;
  const Gate gate = gate_of(manifest, engine.key, report.gate);
  if (!report.measured()) return {"was compiled ahead of time and never measured: " + verify};
  if (report.precision != engine.key.precision) {
    return {"is " + precision + ", and its parity is reported as that of " + name_of(report.precision) + ": " + verify};
  }
  if (!(report.gate == gate)) {
    return {"was measured against the gate " + report.gate.str() + ", and its bundle asks for " + gate.str() + ": " + verify};
  }
  std::vector<std::string> reported, outputs = manifest.backbone.outputs();
  for (const StageParity& one : report.stages) reported.push_back(one.stage);
  auto sorted_reported = reported, sorted_outputs = outputs;
  std::sort(sorted_reported.begin(), sorted_reported.end());
  std::sort(sorted_outputs.begin(), sorted_outputs.end());
  if (sorted_reported != sorted_outputs) {
    return {"returns " + shortened(text_of(outputs), 150) + ", and its parity is reported for " +
            shortened(text_of(reported), 150) + ": " + verify};
  }
  std::vector<StageParity> judged = report.stages;
  for (StageParity& one : judged) {
    one.passed = one.passed && one.finite && is_inside(gate, one.cosine, one.sqnr_db, one.relative);
  }
  const std::string outside = failures(judged);
  if (outside.empty()) return {};
  return {"was outside its gate (" + gate.str() + ") when it was measured (" + outside + "): run edge-backbones compile here"};
}

}  // namespace edge_backbones::promises
