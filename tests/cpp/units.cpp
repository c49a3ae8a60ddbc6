// Checks of small parts of the C++ library, compiled with -ffast-math, as programs of robots often are.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <edge_backbones/edge_backbones.hpp>
#include <string>

namespace eb = edge_backbones;

namespace {

int failures = 0;

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  ++failures;
}

void maps_with_nan_or_infinity_fail_every_gate() {
  for (const char* bad : {"nan", "inf", "-inf"}) {
    const float expected[4] = {1, 2, 3, 4};
    float actual[4] = {1, 2, 3, 4};
    actual[2] = std::strtof(bad, nullptr);
    for (const auto precision : {eb::Precision::fp32, eb::Precision::fp16, eb::Precision::bf16, eb::Precision::int8}) {
      const auto gate = eb::promises::default_gate(precision);
      const auto found = eb::detail::compare_map("map", expected, actual, 4, gate, 5.0);
      check(!found.finite && !found.passed, "a map with NaN or infinity keeps its gate");
      check(eb::detail::compare_map("map", expected, expected, 4, gate, 5.0).passed, "a map is outside its own gate");
    }
  }
}

void values_that_are_not_finite_are_counted() {
  // NaN, two infinities, -0, a subnormal and 65504, at an odd address.
  const unsigned char halves[] = {0, 0x01, 0x7e, 0x00, 0x7c, 0x00, 0xfc, 0x00, 0x80, 0x01, 0x00, 0xff, 0x7b};
  const eb::ConstTensor tensor(halves + 1, eb::DType::float16, {6});
  const auto found = eb::detail::not_finite(tensor, 0, 6);
  check(found.nan == 1 && found.infinite == 2, "values of float16 that are not finite are counted wrongly");
  check(!eb::detail::is_finite(tensor), "NaN in float16 is not found");
  check(eb::detail::is_finite(eb::ConstTensor(halves + 7, eb::DType::float16, {3})), "finite values of float16 are refused");
}

void memory_of_a_new_size_replaces_that_of_an_old_one() {
  eb::detail::MemoryPool pool(2);
  for (int i = 0; i < 2; ++i) pool.give_back(4096, pool.take(4096));
  auto first = pool.take(4096), second = pool.take(4096);
  pool.give_back(4096, std::move(first));
  pool.give_back(4096, std::move(second));  // the pool is full
  auto wanted = pool.take(8192);
  const char* const address = wanted.get();
  pool.give_back(8192, std::move(wanted));
  const auto other = eb::detail::MemoryPool(1).take(8192);  // it takes the address if that was freed
  check(pool.take(8192).get() == address, "a pool that is full of memory of an old size keeps nothing");
}

void maps_are_found_by_any_whole_number() {
  const auto pool = std::make_shared<eb::detail::MemoryPool>(1);
  std::vector<eb::FeatureMap> maps;
  maps.emplace_back("layer1", eb::DType::float32, eb::Shape{1}, std::vector<std::int64_t>{1}, pool);
  const eb::FeatureMaps found(std::move(maps));
  check(&found[0] == &found[0u] && &found[0u] == &found[std::int64_t{0}] && &found[0] == &found["layer1"], "maps differ");
  try {
    found[-1];
    check(false, "there is a map -1");
  } catch (const eb::Error& error) {
    check(error.what() == std::string("there is no map -1: this backbone returns ['layer1']"), error.what());
  }
}

void a_negative_number_of_threads_is_refused_for_one_engine_too() {
  eb::Options options;
  options.threads = -1;
  try {
    eb::Backbone::load_engine({}, {}, options);
    check(false, "an engine is loaded with -1 threads");
  } catch (const eb::Error& error) {
    check(error.what() == std::string("threads must be at least 1, got -1"), error.what());
  }
}

void an_empty_home_is_the_root_as_in_python() {
  ::setenv("HOME", "", 1);
  check(eb::detail::home_folder() == "/", "an empty HOME is not the root");
}

}  // namespace

int main() {
  maps_with_nan_or_infinity_fail_every_gate();
  values_that_are_not_finite_are_counted();
  memory_of_a_new_size_replaces_that_of_an_old_one();
  maps_are_found_by_any_whole_number();
  a_negative_number_of_threads_is_refused_for_one_engine_too();
  an_empty_home_is_the_root_as_in_python();
  return failures == 0 ? 0 : 1;
}
