// Answers the cases that tests/conformance/make_cases.py writes, as C++ sees them: one JSON document in, one out.
#include <cstdio>
#include <edge_backbones/compat.hpp>
#include <edge_backbones/cpus.hpp>
#include <edge_backbones/manifest_json.hpp>
#include <edge_backbones/select.hpp>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>

namespace eb = edge_backbones;
using Json = nlohmann::json;

namespace {

std::string from_hex(const std::string& digits) {
  std::string found;
  for (std::size_t i = 0; i + 1 < digits.size(); i += 2) {
    found += static_cast<char>(std::stoi(digits.substr(i, 2), nullptr, 16));
  }
  return found;
}

Json refusal(const eb::Error& error) { return {{"error", eb::name_of(error.code())}, {"message", error.what()}}; }

eb::Manifest manifest_of(const Json& one) {
  const std::string bytes = from_hex(one.at("manifest").get<std::string>());
  eb::Manifest manifest = eb::decode_manifest(bytes.data(), bytes.size(), "b.bundle/manifest.json");
  manifest.folder = "b.bundle";
  for (const eb::FileRecord& file : manifest.files()) eb::place_of(manifest.folder, file);
  return manifest;
}

Json decoded(const Json& one) {
  const eb::Manifest manifest = manifest_of(one);
  std::vector<std::string> names;
  for (const eb::EngineRecord& engine : manifest.engines) names.push_back(engine.name);
  return {{"engines", names}, {"outputs", manifest.backbone.outputs()}, {"describes", manifest.input.describe()}};
}

eb::Host host_of(const Json& one) {
  eb::Host host;
  host.architecture = one.at("architecture").get<std::string>();
  host.cpu_features = one.at("cpu_features").get<std::vector<std::string>>();
  host.device_name = one.at("device_name").get<std::string>();
  host.versions = one.at("versions").get<std::map<std::string, std::string>>();
  host.no_gpu = one.at("no_gpu").get<std::string>();
  host.jetson = one.at("jetson").get<bool>();
  if (const Json& gpu = one.at("gpu"); !gpu.is_null()) {
    host.gpu = eb::Gpu{};
    host.gpu->name = gpu.at("name").get<std::string>();
    host.gpu->architecture = gpu.at("architecture").get<std::string>();
    host.gpu->driver = gpu.at("driver").get<std::string>();
    host.gpu->multiprocessors = gpu.at("multiprocessors").get<std::int64_t>();
  }
  return host;
}

Json chosen(const Json& one) {
  const eb::Manifest manifest = manifest_of(one);
  const eb::Host host = host_of(one.at("host"));
  eb::Wish wish{one.at("engine").get<std::string>(), one.at("place").get<std::string>(), one.at("code").get<bool>()};
  Json answer = Json::object();
  for (const eb::EngineRecord& engine : manifest.engines) {
    answer["reasons"][engine.name] = eb::select::reasons_against(manifest, engine, host, {engine.name, "auto", false});
    answer["loads"][engine.name] = eb::compat::library_to_load(engine.key, host);
  }
  try {
    wish.engine = eb::select::full_name(manifest, wish.engine);
    const eb::EngineRecord& engine = eb::select::choose_engine(manifest, host, wish);
    answer["chosen"] = engine.name;
    for (const auto& [name, why] : eb::select::passed_over(manifest, engine, host, wish)) answer["passed_over"][name] = why;
  } catch (const eb::Error& error) {
    answer["refusal"] = refusal(error);
  }
  return answer;
}

Json told(const Json& one) {
  const std::string text = from_hex(one.at("text").get<std::string>());
  return {{"visible", eb::visible(text)}, {"printable", eb::is_printable(text)}, {"quoted", eb::quoted(text)},
          {"shortened", eb::shortened(text, 20)}, {"numbers", eb::compat::numbers(text)}};
}

Json quota(const Json& one) {
  const auto found = eb::cpu_quota(one.at("root").get<std::string>());
  return found ? Json(*found) : Json(nullptr);
}

Json machine(const Json& one) {
  const auto cpuinfo = one.at("cpuinfo").get<std::string>();
  return {{"features", eb::cpu_features(cpuinfo, one.at("architecture").get<std::string>())},
          {"name", eb::device_name(cpuinfo)}};
}

Json device(const Json& one) {
  const eb::Device found = eb::parse_device(one.at("device").get<std::string>());
  return {{"place", found.place}, {"gpu", found.gpu}};
}

/// Hash bytes at once, in pieces, and without the CPU's instructions for SHA.
Json hashed(const Json& one) {
  const std::string data = from_hex(one.at("data").get<std::string>());
  eb::Sha256 pieces;
  for (std::size_t at = 0, step = 1; at < data.size(); at += step, step = step % 130 + 7) {
    pieces.update(data.data() + at, std::min(step, data.size() - at));
  }
  std::string padded = data + '\x80';
  while (padded.size() % 64 != 56) padded += '\0';
  for (int shift = 56; shift >= 0; shift -= 8) padded += static_cast<char>((std::uint64_t{data.size()} * 8) >> shift);
  std::uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  eb::detail::sha256_plain(state, reinterpret_cast<const unsigned char*>(padded.data()), padded.size() / 64);
  char plain[65];
  for (int i = 0; i < 8; ++i) std::snprintf(plain + 8 * i, 9, "%08x", state[i]);
  return {{"whole", eb::sha256(data.data(), data.size())}, {"pieces", pieces.hex()}, {"plain", plain}};
}

Json answer(const Json& one) {
  const auto kind = one.at("kind").get<std::string>();
  try {
    return kind == "manifest" ? decoded(one) : kind == "choose" ? chosen(one) : kind == "text" ? told(one)
         : kind == "sha256"   ? hashed(one)
         : kind == "quota"    ? quota(one)   : kind == "machine" ? machine(one) : device(one);
  } catch (const eb::Error& error) {
    return refusal(error);
  }
}

}  // namespace

int main(int count, char** values) {
  if (count != 2) return 2;
  std::ifstream file(values[1]);
  Json answers = Json::object();
  for (const Json& one : Json::parse(file)) answers["answers"].push_back(answer(one));
  for (const eb::Flavour& flavour : eb::flavours) answers["missing"][flavour.name] = eb::compat::missing(flavour.name);
  std::cout << answers.dump(-1, ' ', true) << "\n";
  return 0;
}
