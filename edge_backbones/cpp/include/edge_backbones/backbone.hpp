// Open a bundle with the best engine that fits this machine, and run it: the C++ twin of Python's EdgeBackbone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "back_ends.hpp"
#include "feature_maps.hpp"
#include "files.hpp"
#include "finite.hpp"
#include "layout.hpp"
#include "manifest_json.hpp"
#include "select.hpp"
#include "session.hpp"
#include "trust.hpp"

namespace edge_backbones {

/// How a bundle is opened. Every field has a default that fits most programs.
struct Options {
  std::string engine;               ///< A precision ("int8"), a flavour ("openvino"), or an engine's name or its beginning.
  std::string device = "auto";      ///< "auto", "cpu", "cuda" or "cuda:1". auto: the first GPU if an engine runs there.
  std::vector<std::string> stages;  ///< Feature maps to return, by stage name, in stage order; empty for all of the bundle.
  int threads = 0;                  ///< Most CPU threads of a call; 0 for the library's choice among the usable CPUs.
  bool allow_host_code = false;     ///< Run engines that are programs, and runtimes inside plans.
  bool check_finite = true;         ///< Throw Code::input for NaN and infinity in an input.
  bool signature_checked = false;   ///< Somebody else has checked the signature, where the machine asks for one.
  std::vector<BackEnd> back_ends = default_back_ends();

  /// Return the same options with one more back end: Options{}.with(openvino_back_end()).
  Options with(BackEnd back_end) const {
    Options found = *this;
    found.back_ends.push_back(std::move(back_end));
    return found;
  }
};

namespace detail {

/// One piece of a batch: images `start` to `start + count` run as a batch of `run`, whose rest is zeros.
struct Piece {
  std::int64_t start, count, run;
};

/// Return the fewest pieces in which an engine that takes `batch` can run `count` images.
inline std::vector<Piece> pieces(std::int64_t count, const ShapeRange& batch) {
  std::vector<Piece> found;
  for (std::int64_t start = 0; start < count; start += batch.max) {
    const std::int64_t images = std::min(batch.max, count - start);
    found.push_back({start, images, std::max(images, batch.min)});
  }
  return found;
}

}  // namespace detail

/// A compiled backbone. Several threads may call it at once. Move it, or destroy it, only when no thread is in a call.
class Backbone {
 public:
  /// Open a bundle with the best engine that fits this machine.
  ///
  /// Throws Error: Code::bundle, manifest or integrity for a damaged bundle, Code::engine_mismatch if nothing in it can run
  /// here (with a reason for each engine), Code::input for options. Signatures are not checked, so a machine that
  /// asks for them refuses (Code::bundle) unless Options::signature_checked says that somebody else did.
  static Backbone from_pretrained(const std::string& path, const Options& options = {}) {
    Manifest manifest = read_manifest(path);
    if (!options.signature_checked) refuse_unchecked_signature(manifest.folder);
    for (bool again = true;;) {
      try {
        return Backbone(manifest, options);
      } catch (const Error& error) {
        if (error.code() != Code::integrity) throw;
        Manifest now = read_manifest(path);  // another process may have replaced the manifest meanwhile
        if (now.digest == manifest.digest && !again) throw;
        again = again && now.digest != manifest.digest;
        manifest = std::move(now);
      }
    }
  }

  /// Load one engine of a manifest, whatever its parity report says. The caller has checked that its key fits this machine.
  static Backbone load_engine(const Manifest& manifest, const EngineRecord& engine, const Options& options = {}) {
    require_threads(options);
    const Device device = parse_device(options.device);
    const int gpu = device.place == "cuda" || engine.key.gpu ? device.gpu : -1;
    const Host host = this_host(versions_of(options.back_ends));
    auto session = load_session(manifest, engine, host, options, gpu);
    return Backbone(manifest, engine, std::move(session), options, gpu < 0 ? "cpu" : "cuda:" + std::to_string(gpu));
  }

  /// Run an engine that is loaded already.
  Backbone(Manifest manifest, const EngineRecord& engine, std::unique_ptr<Session> session, const Options& options = {},
           std::string device = "cpu")
      : manifest_(std::move(manifest)),
        engine_(engine),
        session_(std::move(session)),
        device_(std::move(device)),
        checks_(options.check_finite && manifest_.input.dtype() != DType::uint8) {
    describe(options.stages);
  }

  Backbone(Backbone&&) noexcept = default;
  Backbone& operator=(Backbone&&) noexcept = default;

  /// Return the stages that are returned, and what was measured of them, one entry per stage.
  const std::vector<std::string>& out_features() const noexcept { return out_features_; }
  const std::vector<std::int64_t>& out_indices() const noexcept { return out_indices_; }
  const std::vector<std::int64_t>& channels() const noexcept { return channels_; }
  const std::vector<std::pair<std::int64_t, std::int64_t>>& strides() const noexcept { return strides_; }

  /// Return the names of all stages of the network.
  const std::vector<std::string>& stage_names() const noexcept { return manifest_.backbone.stage_names; }

  /// Return the names of all outputs of a call, in order: the chosen stages, then class tokens and hidden states.
  const std::vector<std::string>& outputs() const noexcept { return names_; }

  const InputSpec& input() const noexcept { return manifest_.input; }
  const Manifest& manifest() const noexcept { return manifest_; }

  /// Return the shape of the input that the engine is optimised for.
  Shape opt_shape() const { return manifest_.input.opt_shape(); }

  const std::string& engine_name() const noexcept { return engine_.name; }
  const EngineRecord& engine() const noexcept { return engine_; }

  /// Return where the engine runs: "cpu" or "cuda:0".
  const std::string& device() const noexcept { return device_; }

  /// Return why each other engine of the bundle does not run here, by name.
  const std::vector<std::pair<std::string, std::string>>& passed_over() const noexcept { return passed_over_; }

  /// Return the shape of one output, as callers see it, for an input of any batch. `output` counts as in `outputs`.
  Shape output_shape(std::size_t output, const Shape& input_shape) const {
    const Shape full = with_batch_axis(input_shape);
    manifest_.input.require(full);
    const OutputSpec& spec = specs_.at(index_of(output));
    return detail::callers_shape(spec, engine_shape(index_of(output), full));
  }

  /// Return the strides, in elements, of the memory that the engine writes one output in.
  std::vector<std::int64_t> output_strides(std::size_t output, const Shape& input_shape) const {
    const Shape full = with_batch_axis(input_shape);
    manifest_.input.require(full);
    return detail::callers_strides(specs_.at(index_of(output)), engine_shape(index_of(output), full));
  }

  /// Run the backbone on memory of the host, and return its outputs.
  ///
  /// The batch may be any from 1: a smaller one is filled up with zeros, a larger one runs in pieces. Of an image or a frame,
  /// the batch axis may be left out.
  FeatureMaps operator()(const ConstTensor& pixel_values) {
    const ConstTensor input = checked(pixel_values);
    std::vector<FeatureMap> maps;
    std::vector<Tensor> outputs;
    maps.reserve(chosen_.size());
    for (const std::size_t index : chosen_) {
      const OutputSpec& spec = specs_[index];
      const Shape engine = engine_shape(index, input.shape);
      maps.emplace_back(spec.name, spec.dtype, detail::callers_shape(spec, engine), detail::callers_strides(spec, engine), pool_);
      const ConstTensor map = maps.back().tensor();
      outputs.emplace_back(const_cast<void*>(map.data), map.dtype, map.shape, map.strides);
    }
    run_checked(input, outputs);
    return FeatureMaps(std::move(maps));
  }

  /// Run the backbone on memory of the host, and write its outputs into the caller's memory.
  ///
  /// `outputs` has one tensor per entry of `outputs()`, with the shape that `output_shape` returns. Memory with the strides of
  /// `output_strides` is written to in place; any other strides cost a copy.
  void run(const ConstTensor& pixel_values, const std::vector<Tensor>& outputs) {
    const ConstTensor input = checked(pixel_values);
    require_outputs(input.shape, outputs);
    run_checked(input, outputs);
  }

  /// Enqueue one call on a stream of the GPU (a cudaStream_t) and return without waiting.
  ///
  /// All pointers are of the device. The batch is one that the engine takes. `outputs` has one tensor per output of the bundle
  /// (`manifest().backbone.outputs()`), whatever stages were chosen, with the strides of the engine's own memory.
  void run_on_device(const ConstTensor& pixel_values, const std::vector<Tensor>& outputs, void* stream) {
    ConstTensor input = pixel_values;
    input.shape = with_batch_axis(input.shape);
    require_input(input);
    const ShapeRange& batch = manifest_.input.batch;
    if (!batch.holds(input.shape[0])) {
      throw Error(Code::input, "a batch of " + std::to_string(input.shape[0]) + " on the GPU does not fit: this engine takes " +
                                   batch.str() + " in one call");
    }
    if (!input.is_contiguous()) throw Error(Code::input, manifest_.input.name + " on the GPU has gaps: pass row-major memory");
    if (outputs.size() != specs_.size()) refuse_count(outputs.size(), manifest_.backbone.outputs());
    std::vector<Tensor> engine_outputs;
    for (std::size_t i = 0; i < specs_.size(); ++i) {
      const Shape engine = session_->output_shape(i, input.shape);
      require_output(specs_[i], engine, outputs[i]);
      if (!detail::same_strides(outputs[i].shape, detail::strides_of(outputs[i]), detail::callers_strides(specs_[i], engine))) {
        throw Error(Code::input, specs_[i].name + " on the GPU has other strides than the engine writes: pass those of " +
                                     "output_strides");
      }
      engine_outputs.emplace_back(outputs[i].data, outputs[i].dtype, engine);
    }
    session_->run_on_device(input, engine_outputs, stream);
  }

 private:
  static void require_threads(const Options& options) {
    if (options.threads < 0) throw Error(Code::input, "threads must be at least 1, got " + std::to_string(options.threads));
  }

  Backbone(const Manifest& manifest, const Options& options) : manifest_(manifest) {
    require_threads(options);
    const Device device = parse_device(options.device);
    if (device.place == "cuda" && options.threads != 0) {
      throw Error(Code::input, "threads=" + std::to_string(options.threads) +
                                   " is for engines on the CPU, and device is cuda: leave it out");
    }
    describe(options.stages);
    const Wish wish{select::full_name(manifest_, options.engine), device.place, options.allow_host_code};
    const bool any_on_gpu = std::any_of(manifest_.engines.begin(), manifest_.engines.end(),
                                        [](const EngineRecord& one) { return one.key.gpu.has_value(); });
    const bool needs_gpu = device.place == "cuda" || (device.place == "auto" && any_on_gpu);
    const Host host = this_host(versions_of(options.back_ends), needs_gpu ? std::optional<int>(device.gpu) : std::nullopt);
    engine_ = select::choose_engine(manifest_, host, wish, options.back_ends);
    const bool on_gpu = device.place == "cuda" || (device.place == "auto" && engine_.key.gpu.has_value());
    device_ = on_gpu ? "cuda:" + std::to_string(device.gpu) : "cpu";
    checks_ = options.check_finite && manifest_.input.dtype() != DType::uint8;
    session_ = load_session(manifest_, engine_, host, options, on_gpu ? device.gpu : -1);
    passed_over_ = select::passed_over(manifest_, engine_, host, wish, options.back_ends);
  }

  static std::unique_ptr<Session> load_session(const Manifest& manifest, const EngineRecord& engine, const Host& host,
                                               const Options& options, int gpu) {
    LoadOptions load;
    load.threads = options.threads;
    load.gpu = gpu;
    load.allow_host_code = options.allow_host_code;
    const std::string library = compat::library_to_load(engine.key, host);
    for (const BackEnd& one : options.back_ends) {
      if (one.flavour == library && one.load != nullptr) {
        return one.load(manifest, engine, read_checked(manifest.folder, engine.file), load);
      }
    }
    throw Error(Code::missing_dependency, engine.name + " " + compat::missing(library));
  }

  /// Choose the stages that are returned; throw Code::input for a choice that the bundle does not hold.
  void describe(const std::vector<std::string>& stages) {
    const BackboneSpec& spec = manifest_.backbone;
    specs_ = spec.described_outputs();
    pool_ = std::make_shared<detail::MemoryPool>(4 * specs_.size());
    const auto contains = [](const std::vector<std::string>& names, const std::string& name) {
      return std::find(names.begin(), names.end(), name) != names.end();
    };
    std::vector<std::string> ordered, missing;
    for (const std::string& name : spec.stage_names) {
      if (contains(stages, name)) ordered.push_back(name);
    }
    for (const std::string& name : stages) {
      if (!contains(spec.stage_names, name)) {
        throw Error(Code::input, "out_features must be a subset of stage_names: " + text_of(spec.stage_names) + " got " +
                                     text_of(stages));
      }
      if (!contains(spec.out_features, name)) missing.push_back(name);
    }
    if (ordered.size() < stages.size()) {
      throw Error(Code::input, "out_features must not contain any duplicates, got " + text_of(stages));
    }
    if (ordered != stages) {
      throw Error(Code::input, "out_features must be in the same order as stage_names, expected " + text_of(ordered) + " got " +
                                   text_of(stages));
    }
    if (!missing.empty()) {
      throw Error(Code::input, "stages " + text_of(missing) + " are not compiled into this bundle, which holds " +
                                   text_of(spec.out_features) + ": build it again with these out_features");
    }
    for (std::size_t i = 0; i < specs_.size(); ++i) {
      const bool is_stage = i < spec.out_features.size();
      if (is_stage && !stages.empty() && !contains(stages, specs_[i].name)) continue;
      chosen_.push_back(i);
      names_.push_back(specs_[i].name);
      if (!is_stage) continue;
      out_features_.push_back(specs_[i].name);
      out_indices_.push_back(spec.out_indices[i]);
      channels_.push_back(spec.channels[i]);
      strides_.push_back(spec.strides[i]);
    }
  }

  std::size_t index_of(std::size_t output) const {
    if (output < chosen_.size()) return chosen_[output];
    throw Error(Code::input, "there is no output " + std::to_string(output) + ": this backbone returns " + text_of(names_));
  }

  /// Return the shape of a batch for an image or a frame without its first axis, or without a last axis of one channel.
  Shape with_batch_axis(Shape shape) const {
    const InputSpec& input = manifest_.input;
    if (input.name == "pixel_values") return shape;
    if (input.frame && shape.size() >= 2) {
      const auto one = input.frame->shape();
      const std::size_t end = shape.size();
      if (one[2] == 1 && shape[end - 2] == one[0] && shape[end - 1] == one[1]) shape.push_back(1);
    }
    if (shape.size() == 3) shape.insert(shape.begin(), 1);
    return shape;
  }

  void require_input(const ConstTensor& input) const {
    const InputSpec& spec = manifest_.input;
    if (input.dtype != spec.dtype()) {
      throw Error(Code::input, spec.name + " of dtype " + name_of(input.dtype) + " does not fit: this engine takes " +
                                   spec.describe());
    }
    spec.require(input.shape);
    if (input.data == nullptr) throw Error(Code::input, spec.name + " is a null pointer: pass " + spec.describe());
    if (!input.strides.empty() && input.strides.size() != input.shape.size()) {
      throw Error(Code::input, spec.name + " has " + std::to_string(input.shape.size()) + " axes and " +
                                   std::to_string(input.strides.size()) + " strides: pass one stride per axis, or none");
    }
  }

  /// Return the input with a batch axis, after checking it.
  ConstTensor checked(const ConstTensor& pixel_values) const {
    ConstTensor input = pixel_values;
    const Shape full = with_batch_axis(input.shape);
    if (full != input.shape) {
      if (!input.is_contiguous()) {
        throw Error(Code::input, manifest_.input.name + " has gaps and no batch axis: pass all four axes with their strides");
      }
      input.shape = full;
      input.strides.clear();
    }
    require_input(input);
    return input;
  }

  Shape engine_shape(std::size_t index, const Shape& input_shape) const {
    const ShapeRange& batch = manifest_.input.batch;
    Shape run = input_shape;
    run[0] = std::min(std::max(run[0], batch.min), batch.max);
    Shape found = session_->output_shape(index, run);
    if (!found.empty()) found[0] = input_shape[0];
    return found;
  }

  [[noreturn]] static void refuse_count(std::size_t count, const std::vector<std::string>& names) {
    throw Error(Code::input, std::to_string(count) + " output tensors do not fit: pass one for each of " + text_of(names));
  }

  static void require_output(const OutputSpec& spec, const Shape& engine, const Tensor& given) {
    const Shape shape = detail::callers_shape(spec, engine);
    if (given.dtype != spec.dtype || given.shape != shape) {
      throw Error(Code::input, std::string("memory for ") + name_of(given.dtype) + " " + text_of(given.shape) + " does not fit " +
                                   spec.name + ", which is " + name_of(spec.dtype) + " " + text_of(shape));
    }
    if (given.data == nullptr) throw Error(Code::input, "the memory for " + spec.name + " is a null pointer");
    if (!given.strides.empty() && given.strides.size() != shape.size()) {
      throw Error(Code::input, "the memory for " + spec.name + " needs one stride per axis, or none");
    }
  }

  void require_outputs(const Shape& input_shape, const std::vector<Tensor>& outputs) const {
    if (outputs.size() != chosen_.size()) refuse_count(outputs.size(), names_);
    for (std::size_t i = 0; i < chosen_.size(); ++i) {
      require_output(specs_[chosen_[i]], engine_shape(chosen_[i], input_shape), outputs[i]);
    }
  }

  /// Run the pieces of a batch. `outputs`: one per chosen output, with the shape that callers see.
  void run_checked(ConstTensor input, const std::vector<Tensor>& outputs) {
    detail::Memory packed;
    if (!input.is_contiguous()) {
      packed = pool_->take(input.bytes());
      copy_into(input, packed.get());
      input = ConstTensor(packed.get(), input.dtype, input.shape);
    }
    if (checks_ && !detail::is_finite(input)) refuse_not_finite(input);
    for (const detail::Piece& piece : detail::pieces(input.shape[0], manifest_.input.batch)) run_piece(input, piece, outputs);
    if (packed) pool_->give_back(input.bytes(), std::move(packed));
  }

  static void copy_into(const ConstTensor& input, char* memory) {
    detail::copy_tensor(input, Tensor(memory, input.dtype, input.shape));
  }

  void run_piece(const ConstTensor& input, const detail::Piece& piece, const std::vector<Tensor>& outputs) {
    const std::size_t image = input.bytes() / static_cast<std::size_t>(input.shape[0]);
    const char* first = static_cast<const char*>(input.data) + static_cast<std::size_t>(piece.start) * image;
    ConstTensor images(first, input.dtype, input.shape);
    images.shape[0] = piece.run;
    detail::Memory filled;
    if (piece.run > piece.count) {
      const std::size_t used = static_cast<std::size_t>(piece.count) * image;
      filled = pool_->take(static_cast<std::size_t>(piece.run) * image);
      std::memcpy(filled.get(), first, used);
      std::memset(filled.get() + used, 0, static_cast<std::size_t>(piece.run - piece.count) * image);
      images.data = filled.get();
    }
    std::vector<Tensor> engine_outputs(specs_.size());
    std::vector<detail::Memory> scratch(specs_.size());
    std::vector<bool> to_copy(specs_.size(), false);
    std::vector<const Tensor*> targets(specs_.size(), nullptr);
    for (std::size_t i = 0; i < chosen_.size(); ++i) targets[chosen_[i]] = &outputs[i];
    for (std::size_t i = 0; i < specs_.size(); ++i) {
      Tensor& mine = engine_outputs[i];
      mine = Tensor(nullptr, specs_[i].dtype, session_->output_shape(i, images.shape));
      const Tensor* target = targets[i];
      const bool in_place = target != nullptr && piece.run == piece.count &&
                            detail::same_strides(target->shape, detail::strides_of(*target),
                                                 detail::callers_strides(specs_[i], with_batch(mine.shape, target->shape[0])));
      if (in_place) {
        mine.data = static_cast<char*>(target->data) + image_offset(*target, piece.start);
      } else {
        scratch[i] = pool_->take(mine.bytes());
        mine.data = scratch[i].get();
        to_copy[i] = target != nullptr;
      }
    }
    session_->run(images, engine_outputs);
    for (std::size_t i = 0; i < specs_.size(); ++i) {
      if (to_copy[i]) copy_out(specs_[i], engine_outputs[i], piece, *targets[i]);
      if (scratch[i]) pool_->give_back(engine_outputs[i].bytes(), std::move(scratch[i]));
    }
    if (filled) pool_->give_back(static_cast<std::size_t>(piece.run) * image, std::move(filled));
  }

  static Shape with_batch(Shape shape, std::int64_t batch) {
    shape[0] = batch;
    return shape;
  }

  static std::size_t image_offset(const Tensor& tensor, std::int64_t image) {
    return static_cast<std::size_t>(detail::strides_of(tensor)[0] * image) * bytes_of(tensor.dtype);
  }

  static void copy_out(const OutputSpec& spec, const Tensor& from, const detail::Piece& piece, const Tensor& to) {
    ConstTensor source(from.data, from.dtype, detail::callers_shape(spec, from.shape), detail::callers_strides(spec, from.shape));
    Tensor target(static_cast<char*>(to.data) + image_offset(to, piece.start), to.dtype, to.shape, detail::strides_of(to));
    source.shape[0] = target.shape[0] = piece.count;
    detail::copy_tensor(source, target);
  }

  [[noreturn]] void refuse_not_finite(const ConstTensor& input) const {
    const std::size_t image = input.size() / static_cast<std::size_t>(input.shape[0]);
    std::vector<std::string> found;
    std::size_t bad = 0;
    for (std::size_t n = 0; n < static_cast<std::size_t>(input.shape[0]); ++n) {
      const auto [nan, infinite] = detail::not_finite(input, n * image, (n + 1) * image);
      if (nan + infinite == 0) continue;
      ++bad;
      if (found.size() == 3) continue;
      const std::string what = (nan != 0 ? std::to_string(nan) + " NaN" : "") + (nan != 0 && infinite != 0 ? " and " : "") +
                               (infinite != 0 ? std::to_string(infinite) + " infinite" : "");
      found.push_back(what + " in sample " + std::to_string(n));
    }
    const std::string more = bad > 3 ? ", and more in " + std::to_string(bad - 3) + " other samples" : "";
    throw Error(Code::input, manifest_.input.name + " of shape " + text_of(input.shape) + " has values that are not finite (" +
                                 joined(found) + more + "): replace them, or open the bundle with check_finite = false");
  }

  Manifest manifest_;
  EngineRecord engine_;
  std::unique_ptr<Session> session_;
  std::string device_ = "cpu";
  bool checks_ = true;
  std::vector<OutputSpec> specs_;
  std::vector<std::size_t> chosen_;  // indices of `specs_`
  std::vector<std::string> names_, out_features_;
  std::vector<std::int64_t> out_indices_, channels_;
  std::vector<std::pair<std::int64_t, std::int64_t>> strides_;
  std::vector<std::pair<std::string, std::string>> passed_over_;
  std::shared_ptr<detail::MemoryPool> pool_;
};

}  // namespace edge_backbones
