// Measure how accurate an engine is: compare its outputs with the fp32 golden samples, in double precision.
//
// The same figures as edge_backbones/deploy/parity.py and difference.py; each is that of the worst golden image.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <vector>

#include "backbone.hpp"
#include "finite.hpp"
#include "golden.hpp"
#include "manifest.hpp"
#include "promises.hpp"

namespace edge_backbones {

namespace detail {

constexpr double most_sqnr_db = 300;  // of equal maps, because JSON has no infinity
constexpr double weak_share = 1e-4;   // a map below this share of its stage's usual norm is no reference

/// Return the root mean square of the norms of the maps of one stage, one per image.
inline double usual_norm(const float* maps, std::size_t images, std::size_t values) {
  double squares = 0;
  for (std::size_t i = 0; i < images * values; ++i) squares += static_cast<double>(maps[i]) * maps[i];
  return images == 0 ? 0 : std::sqrt(squares / static_cast<double>(images));
}

/// Compare one map with its reference. Maps with NaN or infinity fail.
inline StageParity compare_map(const std::string& stage, const float* expected, const float* actual, std::size_t values,
                               const Gate& gate, double usual) {
  double reference = 0, length = 0, product = 0, noise = 0, most = 0;
  bool finite = true;
  for (std::size_t i = 0; i < values; ++i) {
    const double r = expected[i], x = actual[i], difference = x - r;
    finite = finite && is_finite_at(expected + i) && is_finite_at(actual + i);
    reference += r * r, length += x * x, product += r * x, noise += difference * difference;
    most = std::max(most, std::fabs(difference));
  }
  StageParity found;
  found.stage = stage;
  if (!finite) return found;
  const double norm = std::sqrt(reference), error = std::sqrt(noise);
  const double scale = norm < weak_share * usual ? usual : norm;
  const double relative = scale > 0 ? error / scale : error > 0 ? 1.0 : 0.0;
  if (!std::isfinite(relative)) return found;
  if (scale == norm && norm > 0) {
    found.cosine = length > 0 ? product / (norm * std::sqrt(length)) : 0.0;
  } else {  // as if the noise were orthogonal to a map of the usual norm
    found.cosine = relative < 1 ? 1 / std::sqrt(1 + relative * relative) : 0.0;
  }
  found.sqnr_db = relative > 0 ? std::min(20 * std::log10(1 / relative), most_sqnr_db) : most_sqnr_db;
  found.max_abs = most;
  found.relative = relative;
  found.finite = true;
  found.passed = promises::is_inside(gate, found.cosine, found.sqnr_db, found.relative);
  return found;
}

/// Return the worst of each figure.
inline StageParity worse(const StageParity& one, const StageParity& other) {
  StageParity found = one;
  found.finite = one.finite && other.finite;
  found.passed = one.passed && other.passed;
  found.cosine = std::min(one.cosine, other.cosine);
  found.sqnr_db = std::min(one.sqnr_db, other.sqnr_db);
  found.max_abs = std::max(one.max_abs, other.max_abs);
  found.relative = std::max(one.relative, other.relative);
  return found;
}

/// Return a map as row-major float32, whatever its dtype and strides.
inline std::vector<float> plain_floats(const FeatureMap& map) {
  std::vector<float> found(size_of(map.shape));
  Tensor target = Tensor::of(found.data(), map.shape);
  if (map.dtype == DType::float32) {
    copy_tensor(map.tensor(), target);
    return found;
  }
  std::vector<Half> halves(found.size());
  copy_tensor(map.tensor(), Tensor::of(halves.data(), map.shape));
  std::transform(halves.begin(), halves.end(), found.begin(), [](Half half) { return half.to_float(); });
  return found;
}

}  // namespace detail

/// Run every golden case through a backbone, and report the worst image of each output.
inline ParityReport measure_parity(Backbone& backbone, const std::vector<GoldenCase>& golden, Precision precision,
                                   const Gate& gate) {
  ParityReport report;
  report.precision = precision;
  report.gate = gate;
  std::vector<const GoldenCase*> cases;
  for (const GoldenCase& one : golden) cases.push_back(&one);
  std::sort(cases.begin(), cases.end(), [](const auto* a, const auto* b) { return a->name < b->name; });
  for (const GoldenCase* one : cases) {
    const FeatureMaps maps = backbone(one->images.tensor());
    const auto images = static_cast<std::size_t>(one->images.shape[0]);
    for (const FeatureMap& map : maps) {
      const Array& reference = one->outputs.at(map.name);
      const std::vector<float> actual = detail::plain_floats(map);
      const std::size_t values = actual.size() / images;
      const auto* expected = reference.tensor().as<float>();
      const double usual = detail::usual_norm(expected, images, values);
      const bool same_shape = reference.shape == map.shape;
      for (std::size_t i = 0; i < images; ++i) {
        StageParity measured;
        measured.stage = map.name;
        if (same_shape) {
          measured = detail::compare_map(map.name, expected + i * values, actual.data() + i * values, values, gate, usual);
        }
        auto found = std::find_if(report.stages.begin(), report.stages.end(),
                                  [&](const StageParity& stage) { return stage.stage == map.name; });
        if (found == report.stages.end()) {
          report.stages.push_back(measured);
        } else {
          *found = detail::worse(*found, measured);
        }
      }
    }
  }
  return report;
}

}  // namespace edge_backbones
