// Read manifest.json, strictly: what edge_backbones/bundle/manifest.py refuses is refused here too.
//
// Unknown keys, missing keys, keys that occur twice, wrong types, numbers out of bounds, another schema_version and a wrong
// digest throw Code::manifest with the path of the field.
#pragma once

#include <map>

#include "engine_name.hpp"
#include "files.hpp"
#include "manifest_fields.hpp"

namespace edge_backbones {

namespace detail {

inline EngineRecord read_engine(const Node& node) {
  Fields fields(node);
  EngineRecord engine;
  engine.key = read_key(fields.at("key"));
  engine.file = read_file_record(fields.at("file"));
  engine.parity = read_parity(fields.at("parity"));
  engine.milliseconds = read_given<double>(fields, "milliseconds", read_milliseconds);
  engine.pipelined_milliseconds = read_given<double>(fields, "pipelined_milliseconds", read_milliseconds);
  engine.layers = read_given_file(fields, "layers");
  engine.timing_cache = read_given_file(fields, "timing_cache");
  fields.finish();
  engine.name = name_of(engine.key);
  return engine;
}

inline GoldenRecord read_golden_record(const Node& node) {
  const auto word = [](const Node& n) {
    auto found = n.text(0, 16);
    if (!matches(found, "", is_lower, 1)) n.refuse("Expected `str` matching regex '^[a-z]+$'");
    return found;
  };
  Fields fields(node);
  GoldenRecord golden;
  golden.file = read_file_record(fields.at("file"));
  golden.cases = fields.at("cases").list(word, 1, 16);
  golden.images = read_texts(fields.at("images"));
  fields.finish();
  return golden;
}

inline FileRecord read_calibration(const Node& node) {
  Fields fields(node);
  const FileRecord file = read_file_record(fields.at("file"));
  fields.at("method").one_of({"auto", "max", "percentile", "entropy", "mse"});
  fields.at("percentile").number(0, 100, true);
  fields.at("chosen").map(read_text);
  fields.at("images").whole(0, std::int64_t{1} << 31);
  fields.at("held_out").whole(0, std::int64_t{1} << 31);
  read_texts(fields.at("skipped"));
  if (const auto reused = fields.find("reused")) reused->boolean();
  fields.finish();
  return file;
}

inline void check_decision(const Node& node) {
  const auto trial = [](const Node& n) {
    Fields fields(n);
    read_precision(fields.at("precision"));
    read_texts(fields.at("blocks"));
    read_cosine(fields.at("cosine"));
    read_decibels(fields.at("sqnr_db"));
    fields.at("passed").boolean();
    read_given<double>(fields, "milliseconds", read_milliseconds);
    if (const auto format = fields.find("computes_in")) format->one_of({"fp32", "fp16", "bf16"});
    fields.finish();
    return true;
  };
  const auto noise = [](const Node& n) {
    Fields fields(n);
    fields.at("block").text();
    fields.at("sqnr_db").map(read_decibels);
    fields.finish();
    return true;
  };
  Fields fields(node);
  fields.at("sentence").text();
  fields.at("device_name").text();
  fields.at("trials").list(trial);
  if (const auto sensitivity = fields.find("sensitivity")) sensitivity->list(noise);
  fields.finish();
}

inline void check_provenance(const Node& node) {
  Fields fields(node);
  fields.at("created").text();
  fields.at("versions").map(read_text);
  fields.finish();
}

template <class Names>
void require_different(const Node& node, const char* what, const Names& names) {
  std::set<std::string> seen;
  for (const std::string& name : names) {
    if (!seen.insert(name).second) node.refuse(std::string("two ") + what + " are " + quoted(name));
  }
}

/// Refuse what each field allows and the whole does not.
inline void check_whole(const Node& node, const Manifest& manifest) {
  std::vector<std::string> engines, graphs;
  for (const EngineRecord& engine : manifest.engines) engines.push_back(engine.name);
  for (const GraphRecord& graph : manifest.graphs) graphs.push_back(graph.format + " " + name_of(graph.precision));
  require_different(node, "engines", engines);
  require_different(node, "graphs", graphs);
  require_different(node, "cases", manifest.golden.cases);
  std::map<std::string, FileRecord> by_path;
  for (const FileRecord& file : manifest.files()) {  // a TorchScript engine is the same file as its graph
    if (by_path.emplace(file.path, file).first->second != file) node.refuse("two files are at " + quoted(file.path));
  }
  const auto& cases = manifest.golden.cases;
  if (std::find(cases.begin(), cases.end(), "opt") == cases.end()) node.refuse("the golden samples lack the case 'opt'");
  if (static_cast<std::int64_t>(manifest.image.mean.size()) != manifest.input.channels) {
    node.refuse("the input has " + std::to_string(manifest.input.channels) + " channels, and mean and std are of " +
                std::to_string(manifest.image.mean.size()));
  }
}

inline Manifest read_fields(const Node& root) {
  Fields fields(root);
  Manifest manifest;
  manifest.version = static_cast<int>(fields.at("schema_version").whole(oldest_schema_version, schema_version));
  manifest.backbone = read_backbone(fields.at("backbone"));
  manifest.input = read_input(fields.at("input"));
  manifest.image = read_image(fields.at("image"));
  manifest.source = read_source(fields.at("source"));
  manifest.graphs = fields.at("graphs").list(read_graph);
  manifest.engines = fields.at("engines").list(read_engine);
  manifest.golden = read_golden_record(fields.at("golden"));
  const Node calibration = fields.at("calibration"), decision = fields.at("decision");
  if (!calibration.is_null()) manifest.calibration = read_calibration(calibration);
  if (!decision.is_null()) check_decision(decision);
  check_provenance(fields.at("provenance"));
  if (const auto digest = fields.find("digest")) manifest.digest = digest->text();
  fields.finish();
  check_whole(root, manifest);
  return manifest;
}

/// Return whether the file ends with its digest, and the digest is that of its other bytes.
inline bool has_digest(const char* data, std::size_t size, const std::string& digest) {
  const std::string before = "  \"digest\": \"", after = "\"\n}\n";
  const std::size_t length = before.size() + 64 + after.size();
  if (size < length || digest.size() != 64) return false;
  const char* end = data + (size - length);
  const std::string found(end + before.size(), 64);
  if (std::memcmp(end, before.data(), before.size()) != 0 || found != digest ||
      std::memcmp(end + before.size() + 64, after.data(), after.size()) != 0) {
    return false;
  }
  Sha256 computed;
  computed.update(data, size - 64 - after.size());
  computed.update(after.data(), after.size());
  return computed.hex() == digest;
}

}  // namespace detail

/// Parse and check the bytes of a manifest.json; `source` is its path, for messages. Throws Code::manifest.
inline Manifest decode_manifest(const char* data, std::size_t size, const std::string& source = "manifest.json") {
  if (size > max_manifest_bytes) {
    throw Error(Code::manifest, source + " has " + std::to_string(size) + " bytes, more than the " +
                                    std::to_string(max_manifest_bytes) + " a manifest may have");
  }
  Manifest manifest;
  try {
    const detail::Json document = detail::parse_strictly(data, size);
    const detail::Node root(document, nullptr, "$");
    const std::int64_t version = detail::Fields(root).at("schema_version").whole(0, std::int64_t{1} << 31);
    if (version < oldest_schema_version || version > schema_version) {
      throw Error(Code::manifest, source + " has schema_version " + std::to_string(version) + ", this release reads " +
                                      std::to_string(oldest_schema_version) + " to " + std::to_string(schema_version) + ": " +
                                      (version > schema_version ? "upgrade edge-backbones" : "build the bundle again"));
    }
    manifest = detail::read_fields(root);
  } catch (const detail::Refusal& refusal) {
    throw Error(Code::manifest, source + " is not a valid manifest: " + shortened(visible(refusal.why), 240) +
                                    "; restore it or build the bundle again");
  }
  if (!detail::has_digest(data, size, manifest.digest)) {
    throw Error(Code::manifest,
                source + " was changed after it was written (its digest differs): restore it or build the bundle again");
  }
  return manifest;
}

/// Read and check a bundle's manifest.json and the paths that it names. Throws Code::bundle and Code::manifest.
inline Manifest read_manifest(const std::string& path) {
  if (path.empty()) throw Error(Code::bundle, "the path of the bundle is empty: pass the path of its folder");
  const std::string folder = detail::normal_path(path), file = detail::below(folder, "manifest.json");
  const bool has_null = path.find('\0') != std::string::npos;
  struct stat found {};
  if (has_null || ::stat(folder.c_str(), &found) != 0) {
    throw Error(Code::bundle, folder + " is not a bundle: there is no such folder");
  }
  if (!S_ISDIR(found.st_mode)) {
    const std::size_t slash = folder.rfind('/');
    const std::string name = slash == std::string::npos ? folder : folder.substr(slash + 1);
    const std::string parent = slash == std::string::npos ? "." : slash == 0 ? "/" : folder.substr(0, slash);
    throw Error(Code::bundle, folder + " is not a bundle: " +
                                  (name == "manifest.json" ? "it is a file of one: pass its folder, " + parent
                                                           : "it is a file, and a bundle is a folder (tar -xf unpacks one that "
                                                             "edge-backbones pack wrote as a tar file)"));
  }
  std::vector<char> data;
  try {
    const auto [number, size] = detail::open_file(file);
    const detail::Descriptor open(number);
    if (size > max_manifest_bytes) {
      throw detail::FileError{EFBIG, "it has " + std::to_string(size) + " bytes, more than the " +
                                         std::to_string(max_manifest_bytes) + " it may have"};
    }
    data = detail::read_bytes(open.get(), static_cast<std::size_t>(size));
  } catch (const detail::FileError& error) {
    if (error.number == ENOENT) throw Error(Code::bundle, folder + " is not a bundle: it has no manifest.json");
    throw Error(Code::manifest, file + " cannot be read: " + error.why);
  }
  Manifest manifest = decode_manifest(data.data(), data.size(), file);
  manifest.folder = folder;
  for (const FileRecord& record : manifest.files()) place_of(folder, record);
  return manifest;
}

}  // namespace edge_backbones
