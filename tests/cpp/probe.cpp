// Opens a bundle as a JSON request says, runs inputs from files, and writes what came out: the C++ half of tests/cpp.
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <edge_backbones/edge_backbones.hpp>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <thread>

namespace eb = edge_backbones;
using Json = nlohmann::json;

namespace {

eb::DType dtype_of(const std::string& name) {
  return name == "float32" ? eb::DType::float32 : name == "float16" ? eb::DType::float16 : eb::DType::uint8;
}

std::vector<char> file_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::vector<char>(std::istreambuf_iterator<char>(file), {});
}

Json refusal(const eb::Error& error) { return {{"error", eb::name_of(error.code())}, {"message", error.what()}}; }

eb::Options options_of(const Json& one) {
  eb::Options options;
  options.engine = one.value("engine", "");
  options.device = one.value("device", "auto");
  options.stages = one.value("stages", std::vector<std::string>{});
  options.threads = one.value("threads", 0);
  options.allow_host_code = one.value("allow_host_code", false);
  options.check_finite = one.value("check_finite", true);
  options.signature_checked = one.value("signature_checked", false);
  return options;
}

/// Write the values of a tensor, row-major, and describe it.
Json written(const std::string& name, const eb::ConstTensor& tensor, const std::string& path) {
  std::vector<char> plain(tensor.bytes());
  eb::detail::copy_tensor(tensor, eb::Tensor(plain.data(), tensor.dtype, tensor.shape));
  std::ofstream(path, std::ios::binary).write(plain.data(), static_cast<std::streamsize>(plain.size()));
  return {{"name", name}, {"dtype", eb::name_of(tensor.dtype)}, {"shape", tensor.shape}, {"strides", tensor.strides}, {"file", path}};
}

Json as_maps(eb::Backbone& backbone, const eb::ConstTensor& input, const std::string& out) {
  Json found = Json::array();
  const eb::FeatureMaps maps = backbone(input);
  for (const eb::FeatureMap& map : maps) found.push_back(written(map.name, map.tensor(), out + "." + std::to_string(found.size())));
  return found;
}

/// Run into memory of the caller's: with the engine's strides, or row-major, with a guard behind every map.
Json into_memory(eb::Backbone& backbone, const eb::ConstTensor& input, const std::string& out, bool row_major) {
  std::vector<std::vector<char>> memory;
  std::vector<eb::Tensor> outputs;
  for (std::size_t i = 0; i < backbone.outputs().size(); ++i) {
    const eb::Shape shape = backbone.output_shape(i, input.shape);
    const auto dtype = backbone.manifest().backbone.map_dtype;
    memory.emplace_back(eb::size_of(shape) * eb::bytes_of(dtype) + 64, '\x5a');
    outputs.emplace_back(memory.back().data(), dtype, shape,
                         row_major ? std::vector<std::int64_t>{} : backbone.output_strides(i, input.shape));
  }
  backbone.run(input, outputs);
  Json found = Json::array();
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    for (std::size_t k = memory[i].size() - 64; k < memory[i].size(); ++k) {
      if (memory[i][k] != '\x5a') throw std::runtime_error("bytes behind a map were written to");
    }
    found.push_back(written(backbone.outputs()[i], outputs[i].constant(), out + "." + std::to_string(i)));
  }
  return found;
}

/// Call from several threads at once; return the maps of the last thread, after comparing all of them.
Json in_threads(eb::Backbone& backbone, const eb::ConstTensor& input, const std::string& out, int count) {
  std::vector<std::thread> threads;
  std::vector<std::vector<std::vector<char>>> bytes(static_cast<std::size_t>(count));
  for (int t = 0; t < count; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < 4; ++round) {
        const eb::FeatureMaps maps = backbone(input);
        auto& mine = bytes[static_cast<std::size_t>(t)];
        mine.clear();
        for (const eb::FeatureMap& map : maps) {
          const auto* first = static_cast<const char*>(map.tensor().data);
          mine.emplace_back(first, first + map.tensor().bytes());
        }
      }
    });
  }
  for (std::thread& one : threads) one.join();
  for (const auto& one : bytes) {
    if (one != bytes.front()) throw std::runtime_error("threads got different maps");
  }
  return as_maps(backbone, input, out);
}

Json called(eb::Backbone& backbone, const Json& one, const std::string& out) {
  try {
    const std::vector<char> bytes = file_bytes(one.at("file").get<std::string>());
    eb::ConstTensor input(bytes.data(), dtype_of(one.at("dtype").get<std::string>()), one.at("shape").get<eb::Shape>(),
                          one.value("strides", std::vector<std::int64_t>{}));
    if (one.value("null", false)) input.data = nullptr;
    const std::string mode = one.value("mode", "maps");
    if (mode == "in_place" || mode == "row_major") return {{"maps", into_memory(backbone, input, out, mode == "row_major")}};
    if (mode == "threads") return {{"maps", in_threads(backbone, input, out, 4)}};
    if (mode == "too_few") backbone.run(input, {});
    if (mode == "too_small") {
      float value = 0;
      backbone.run(input, std::vector<eb::Tensor>(backbone.outputs().size(), eb::Tensor::of(&value, {1})));
    }
    if (mode == "on_device") backbone.run_on_device(input, {}, nullptr);
    if (mode == "no_such_map") backbone(input)["nobody"];
    return {{"maps", as_maps(backbone, input, out)}};
  } catch (const eb::Error& error) {
    return refusal(error);
  }
}

/// Call in a forked child, which has no threads of OpenVINO; the child says what happened through its exit code.
Json in_child(eb::Backbone& backbone) {
  const pid_t child = ::fork();
  if (child == 0) {
    int code = 1;
    try {
      const eb::Shape shape = backbone.opt_shape();
      if (backbone.input().height.is_fixed()) {
        std::vector<float> zeros(eb::size_of(shape));
        backbone(eb::ConstTensor::of(zeros.data(), shape));
      } else {
        backbone.output_shape(0, shape);  // it runs the engine once
      }
    } catch (const eb::Error& error) {
      code = error.code() == eb::Code::inference && std::strstr(error.what(), "forked") != nullptr ? 42 : 2;
    }
    { const eb::Backbone released = std::move(backbone); }
    ::_exit(code);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

Json parity_of(const eb::Manifest& manifest, const eb::EngineRecord& engine) {
  Json found = Json::object();
  eb::Backbone backbone = eb::Backbone::load_engine(manifest, engine);
  const eb::Gate gate = eb::promises::gate_of(manifest, engine.key, engine.parity.gate);
  const auto report = eb::measure_parity(backbone, eb::load_golden(manifest), engine.key.precision, gate);
  for (const eb::StageParity& one : report.stages) {
    found[one.stage] = {one.cosine, one.sqnr_db, one.max_abs, one.relative, one.finite, one.passed};
  }
  return found;
}

Json described(const eb::Backbone& backbone) {
  Json over = Json::object();
  for (const auto& [name, why] : backbone.passed_over()) over[name] = why;
  return {{"engine", backbone.engine_name()},   {"device", backbone.device()},
          {"passed_over", over},                {"out_features", backbone.out_features()},
          {"out_indices", backbone.out_indices()}, {"channels", backbone.channels()},
          {"strides", backbone.strides()},      {"stage_names", backbone.stage_names()},
          {"opt_shape", backbone.opt_shape()},  {"input", backbone.input().describe()}};
}

Json answer(const Json& request) {
  const auto path = request.at("bundle").get<std::string>();
  Json found;
  try {
    if (request.value("parity", false)) {
      const eb::Manifest manifest = eb::read_manifest(path);
      for (const eb::EngineRecord& engine : manifest.engines) found["parity"][engine.name] = parity_of(manifest, engine);
      return found;
    }
    if (request.value("golden", false)) {
      for (const eb::GoldenCase& one : eb::load_golden(eb::read_manifest(path))) found["cases"].push_back(one.name);
      return found;
    }
    eb::Backbone opened = eb::Backbone::from_pretrained(path, options_of(request.value("options", Json::object())));
    eb::Backbone backbone = std::move(opened);
    found["description"] = described(backbone);
    for (const Json& one : request.value("calls", Json::array())) {
      const std::string out = request.at("out").get<std::string>() + "/" + std::to_string(found["results"].size());
      found["results"].push_back(called(backbone, one, out));
    }
    if (request.value("fork", false)) found["child"] = in_child(backbone);
  } catch (const eb::Error& error) {
    found["refusal"] = refusal(error);
  }
  return found;
}

}  // namespace

int main(int count, char** values) {
  if (count != 2) return 2;
  std::ifstream file(values[1]);
  Json answers = Json::array();
  for (const Json& request : Json::parse(file)) answers.push_back(answer(request));
  std::cout << answers.dump(-1, ' ', true) << "\n";
  return 0;
}
