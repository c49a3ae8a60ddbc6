// edge-backbones-verify BUNDLE [--engine E] [--device D] [--allow-host-code]
//
// Checks every file of a bundle, runs the golden samples through every engine that can run here, and prints how close each is
// to fp32. Exit codes as those of `edge-backbones verify`: 0 all engines keep their gates, 1 an error, 2 wrong usage, 3 an
// engine is outside its gate.
#include <cstdio>
#include <edge_backbones/edge_backbones.hpp>
#include <string>
#include <vector>

namespace eb = edge_backbones;

namespace {

struct Arguments {
  std::string bundle;
  eb::Options options;
};

void print_usage(std::FILE* where) {
  std::fputs("usage: edge-backbones-verify BUNDLE [--engine E] [--device D] [--allow-host-code]\n", where);
}

bool parse(int count, char** values, Arguments& found) {
  for (int i = 1; i < count; ++i) {
    const std::string word = values[i];
    if ((word == "--engine" || word == "--device") && i + 1 < count) {
      (word == "--engine" ? found.options.engine : found.options.device) = values[++i];
    } else if (word == "--allow-host-code") {
      found.options.allow_host_code = true;
    } else if (found.bundle.empty() && !word.empty() && word[0] != '-') {
      found.bundle = word;
    } else {
      return false;
    }
  }
  return !found.bundle.empty();
}

void print_report(const std::string& name, const eb::ParityReport& report) {
  std::printf("parity of %s with fp32 torch, worst golden image; gate: %s\n", name.c_str(), report.gate.str().c_str());
  std::printf("%-24s %9s %8s %14s %16s  %s\n", "stage", "cosine", "SQNR dB", "relative error", "max |difference|", "verdict");
  for (const eb::StageParity& one : report.stages) {
    const std::string stage = eb::visible(one.stage);
    const char* verdict = one.passed ? "pass" : "FAIL";
    if (one.finite) {
      std::printf("%-24s %9.6f %8.1f %14.1e %16.3g  %s\n", stage.c_str(), one.cosine, one.sqnr_db, one.relative, one.max_abs,
                  verdict);
    } else {
      std::printf("%-24s %9s %8s %14s %16s  %s\n", stage.c_str(), "-", "-", "not finite", "-", verdict);
    }
  }
}

/// Return the engines that `--engine` asks for and that can run here; a parity report that speaks against one does not count.
std::vector<std::string> runnable(const eb::Manifest& manifest, const eb::Options& options) {
  const eb::Device device = eb::parse_device(options.device);
  const eb::Wish wish{eb::select::full_name(manifest, options.engine), device.place, options.allow_host_code};
  bool on_gpu = device.place == "cuda";
  for (const eb::EngineRecord& one : manifest.engines) on_gpu = on_gpu || (device.place == "auto" && one.key.gpu);
  const eb::Host host = eb::this_host(eb::versions_of(options.back_ends), on_gpu ? std::optional<int>(device.gpu) : std::nullopt);
  const auto fitting = eb::select::fitting_engines(manifest, wish, [&](const eb::EngineRecord& engine) {
    auto reasons = eb::select::against_place(engine, device.place);
    eb::compat::append(reasons, eb::select::code_reasons(engine, wish));
    return reasons.empty() ? eb::compat::reasons_against(engine.key, host, options.back_ends) : reasons;
  });
  std::vector<std::string> names;
  for (const eb::EngineRecord* one : fitting) names.push_back(one->name);
  return names;
}

int verify(const Arguments& arguments) {
  const eb::Manifest manifest = eb::read_manifest(arguments.bundle);
  for (const eb::FileRecord& file : manifest.files()) eb::read_checked(manifest.folder, file);
  const auto golden = eb::load_golden(manifest);
  std::string outside;
  for (const std::string& name : runnable(manifest, arguments.options)) {
    const eb::EngineRecord* record = nullptr;
    for (const eb::EngineRecord& one : manifest.engines) {
      if (one.name == name) record = &one;
    }
    eb::Backbone backbone = eb::Backbone::load_engine(manifest, *record, arguments.options);
    const eb::Gate gate = eb::promises::gate_of(manifest, record->key, record->parity.gate);
    const eb::ParityReport report = eb::measure_parity(backbone, golden, record->key.precision, gate);
    print_report(name, report);
    if (!report.passed()) {
      outside += (outside.empty() ? "" : "; ") + std::string(eb::name_of(report.precision)) + " is outside its gate (" +
                 report.gate.str() + "): " + eb::promises::failures(report.stages);
    }
  }
  if (!outside.empty()) {
    std::fprintf(stderr, "ParityError: %s. Compile it again with edge-backbones compile %s\n", eb::visible(outside).c_str(),
                 manifest.folder.c_str());
    return 3;
  }
  std::printf("%s is whole and right; its signature was not checked\n", manifest.folder.c_str());
  return 0;
}

}  // namespace

int main(int count, char** values) {
  Arguments arguments;
  if (!parse(count, values, arguments)) {
    print_usage(stderr);
    return 2;
  }
  try {
    return verify(arguments);
  } catch (const eb::Error& error) {
    std::fprintf(stderr, "%s: %s\n", eb::name_of(error.code()), error.what());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
  }
  return 1;
}
