// call BUNDLE ENGINE ROUNDS WARMUP: opens a bundle, says when the first maps are there, and prints the seconds of every call.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <edge_backbones/edge_backbones.hpp>
#include <vector>

namespace eb = edge_backbones;
using Clock = std::chrono::steady_clock;

int main(int count, char** arguments) {
  if (count != 5) return 2;
  const auto seconds = [](Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); };
  eb::Options options;
  options.engine = arguments[2];
  options.device = "cpu";
  const auto begun = Clock::now();
  eb::Backbone backbone = eb::Backbone::from_pretrained(arguments[1], options);
  const double load = seconds(begun);
  const eb::Shape shape = backbone.opt_shape();
  std::vector<float> pixels(eb::size_of(shape));
  unsigned state = 1;
  for (float& one : pixels) one = static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1.0f;
  const eb::ConstTensor input = eb::ConstTensor::of(pixels.data(), shape);
  double sum = static_cast<double>(backbone(input)[0].data<float>()[0]);
  std::puts("first");
  std::fflush(stdout);
  const int warmup = std::atoi(arguments[4]), rounds = std::atoi(arguments[3]);
  for (int i = 0; i < warmup; ++i) backbone(input);
  std::printf("{\"load\": %.9f, \"calls\": [", load);
  for (int i = 0; i < rounds; ++i) {
    const auto start = Clock::now();
    const eb::FeatureMaps maps = backbone(input);
    const double time = seconds(start);
    sum += static_cast<double>(maps[0].data<float>()[0]);
    std::printf("%s%.9f", i == 0 ? "" : ", ", time);
  }
  std::printf("], \"sum\": %.6g}\n", sum);
}
