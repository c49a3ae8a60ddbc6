// run_torchscript BUNDLE [--allow] [--engine E] [--device D] [--threads N] [--input FILE BATCH HEIGHT WIDTH] [--fork]
//
// Prints the parity of the golden samples, one line per stage. With --input it runs float32 pixels from FILE, three threads at
// once, and writes FILE.STAGE. With --fork a forked child calls the backbone too, and says what it was told.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <edge_backbones/edge_backbones.hpp>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

namespace eb = edge_backbones;

namespace {

void print_parity(eb::Backbone& backbone) {
  const eb::EngineRecord& engine = backbone.engine();
  const auto golden = eb::load_golden(backbone.manifest());
  const eb::ParityReport report = eb::measure_parity(backbone, golden, engine.key.precision, engine.parity.gate);
  for (const eb::StageParity& one : report.stages) {
    std::printf("%s %.12f %.6e\n", one.stage.c_str(), one.cosine, one.max_abs);
  }
}

void run_file(eb::Backbone& backbone, const std::string& path, std::int64_t batch, std::int64_t height, std::int64_t width) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> pixels{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const eb::ConstTensor input(pixels.data(), eb::DType::float32, {batch, 3, height, width});
  std::vector<eb::FeatureMaps> found;
  for (int i = 0; i < 3; ++i) found.push_back(backbone(input));  // torch optimises in the first calls
  std::vector<std::thread> threads;
  for (eb::FeatureMaps& maps : found) {
    threads.emplace_back([&] { maps = backbone(input); });
  }
  for (std::thread& one : threads) one.join();
  for (std::size_t i = 0; i < found[0].size(); ++i) {
    const eb::FeatureMap& map = found[0][i];
    const std::size_t bytes = eb::size_of(map.shape) * sizeof(float);
    for (const eb::FeatureMaps& other : found) {
      if (std::memcmp(other[i].data<float>(), map.data<float>(), bytes) != 0) throw std::runtime_error("threads differ");
    }
    std::ofstream out(path + "." + map.name, std::ios::binary);
    out.write(static_cast<const char*>(map.tensor().data), static_cast<std::streamsize>(bytes));
  }
}

void call_in_child(eb::Backbone& backbone) {
  std::fflush(stdout);
  if (::fork() != 0) {
    ::wait(nullptr);
    return;
  }
  ::alarm(60);  // without the refusal a child waits for ever
  try {
    const std::vector<float> zeros(eb::size_of(backbone.opt_shape()));
    backbone(eb::ConstTensor::of(zeros.data(), backbone.opt_shape()));
  } catch (const eb::Error& error) {
    std::fprintf(stderr, "%s: %s\n", eb::name_of(error.code()), error.what());
  }
  ::_exit(0);
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string> words(arguments + 1, arguments + count);
  eb::Options options;
  options.engine = "torchscript";
  options.device = "cpu";
  std::string file;
  bool forks = false;
  std::int64_t sizes[3] = {};
  for (std::size_t i = 1; i < words.size(); ++i) {
    if (words[i] == "--allow") options.allow_host_code = true;
    if (words[i] == "--fork") forks = true;
    if (words[i] == "--engine") options.engine = words[++i];
    if (words[i] == "--device") options.device = words[++i];
    if (words[i] == "--threads") options.threads = std::atoi(words[++i].c_str());
    if (words[i] == "--input") {
      file = words[++i];
      for (std::int64_t& size : sizes) size = std::atol(words[++i].c_str());
    }
  }
  try {
    eb::Backbone backbone = eb::Backbone::from_pretrained(words.at(0), options);
    print_parity(backbone);
    if (!file.empty()) run_file(backbone, file, sizes[0], sizes[1], sizes[2]);
    if (forks) call_in_child(backbone);
  } catch (const eb::Error& error) {
    std::fprintf(stderr, "%s: %s\n", eb::name_of(error.code()), error.what());
    return 1;
  }
  return 0;
}
