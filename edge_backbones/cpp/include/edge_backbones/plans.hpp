// What is known about a plan of TensorRT without TensorRT: its first bytes, its optimisation profiles, words in a log.
//
// The rules and the sentences are those of edge_backbones/engines/tensorrt (plans.py, profiles.py).
#pragma once

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>
#include <initializer_list>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "compat.hpp"
#include "errors.hpp"
#include "manifest.hpp"
#include "text.hpp"
#include "types.hpp"

namespace edge_backbones::plans {

/// One optimisation profile: the smallest, the usual and the largest shape of the input.
struct Profile {
  int index = 0;
  Shape min, opt, max;

  bool holds(const Shape& shape) const {
    if (shape.size() != min.size()) return false;
    for (std::size_t i = 0; i < shape.size(); ++i) {
      if (shape[i] < min[i] || shape[i] > max[i]) return false;
    }
    return true;
  }

  std::string str() const {
    return "profile " + std::to_string(index) + ": min " + text_of(min) + ", opt " + text_of(opt) + ", max " + text_of(max);
  }
};

/// Return a line about every profile, for messages.
inline std::string text_of_profiles(const std::vector<Profile>& profiles) {
  std::vector<std::string> lines;
  for (const Profile& profile : profiles) lines.push_back(profile.str());
  return joined(lines, "; ");
}

/// Return the tightest profile that holds a shape: the smallest maximum, then the nearest optimum, then the first.
///
/// Throws Code::input, which lists every profile, if none holds it.
inline const Profile& choose_profile(const std::vector<Profile>& profiles, const Shape& shape) {
  const Profile* best = nullptr;
  std::pair<std::size_t, std::size_t> lowest;
  for (const Profile& profile : profiles) {
    if (!profile.holds(shape)) continue;
    const std::size_t asked = size_of(shape), usual = size_of(profile.opt);
    const std::pair<std::size_t, std::size_t> cost{size_of(profile.max), asked > usual ? asked - usual : usual - asked};
    if (best == nullptr || cost < lowest) {
      best = &profile;
      lowest = cost;
    }
  }
  if (best == nullptr) {
    throw Error(Code::input, "the input of shape " + text_of(shape) + " fits no optimisation profile of this engine (" +
                                 text_of_profiles(profiles) +
                                 "): pass a shape inside one, or build the engine with wider ranges");
  }
  return *best;
}

/// Return input shapes that the manifest allows and no profile holds; empty if there are none.
///
/// It tries the corners of the allowed sizes, and the sizes just beyond each profile.
inline std::vector<Shape> uncovered(const std::vector<Profile>& profiles, const InputSpec& input) {
  const bool is_first = input.layout() == "NCHW";
  const std::array<std::tuple<std::size_t, ShapeRange, std::int64_t>, 3> axes{{
      {0, input.batch, 1},
      {is_first ? 2 : 1, input.height, input.size_multiple},
      {is_first ? 3 : 2, input.width, input.size_multiple},
  }};
  std::array<std::set<std::int64_t>, 3> tried;
  for (std::size_t i = 0; i < axes.size(); ++i) {
    const auto& [axis, sizes, step] = axes[i];
    tried[i] = {sizes.min, sizes.opt, sizes.max};
    for (const Profile& profile : profiles) {
      const std::int64_t beyond = axis < profile.max.size() ? profile.max[axis] + step : 0;
      if (sizes.holds(beyond)) tried[i].insert(beyond);
    }
  }
  std::vector<Shape> missing;
  for (const std::int64_t batch : tried[0]) {
    for (const std::int64_t height : tried[1]) {
      for (const std::int64_t width : tried[2]) {
        const Shape shape = input.shape(batch, height, width);
        const bool is_held = std::any_of(profiles.begin(), profiles.end(), [&](const Profile& p) { return p.holds(shape); });
        if (!is_held && std::find(missing.begin(), missing.end(), shape) == missing.end()) missing.push_back(shape);
      }
    }
  }
  return missing;
}

/// Return whether two version texts are of one release. Some packages of TensorRT leave the build number out: "10.3.0" is
/// 10.3.0.30, and three numbers must be there.
inline bool is_same_release(const std::string& one, const std::string& other) {
  const std::vector<std::int64_t> left = compat::numbers(one), right = compat::numbers(other);
  const std::size_t common = std::min(left.size(), right.size());
  return one == other || (common >= 3 && std::equal(left.begin(), left.begin() + static_cast<std::ptrdiff_t>(common),
                                                    right.begin()));
}

namespace detail {

constexpr std::size_t rtx_header_bytes = 64;

/// The bit of an architecture in the mask of a plan of TensorRT-RTX, as release 1.7 writes it; 0 for one without.
inline unsigned rtx_bit(const std::string& architecture) {
  static constexpr const char* names[] = {"sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"};
  for (unsigned i = 0; i < 6; ++i) {
    if (architecture == names[i]) return 1u << i;
  }
  return 0;
}

inline bool begins(const std::string& text, const std::string& with) { return text.compare(0, with.size(), with) == 0; }

}  // namespace detail

/// Return what is wrong with a plan according to its first 64 bytes, one phrase each.
///
/// A plan of TensorRT-RTX begins with its name, the file's length, the release and a mask of architectures. The header of
/// TensorRT's plans is not documented: only an empty plan, or one of TensorRT-RTX, can be recognised.
inline std::vector<std::string> reasons_in_plan(const EngineKey& key, const std::vector<char>& plan) {
  if (plan.empty()) return {"the plan is empty: compile it again"};
  const std::string head(plan.begin(), plan.begin() + std::min<std::ptrdiff_t>(4, static_cast<std::ptrdiff_t>(plan.size())));
  const bool is_rtx = head == "vtrt";
  if (key.flavour != "tensorrt_rtx") {
    if (is_rtx) return {"the plan was written by tensorrt_rtx: open it with that flavour, or compile it again"};
    return {};
  }
  if (!is_rtx) {
    return {"the plan does not begin as those of tensorrt_rtx do: it is damaged or another library's; compile it again"};
  }
  const std::string size = std::to_string(plan.size());
  if (plan.size() < detail::rtx_header_bytes) {
    return {"the plan is truncated: " + size + " bytes, its header alone has " + std::to_string(detail::rtx_header_bytes) +
            "; copy it again"};
  }
  const auto byte = [&](std::size_t at) { return static_cast<unsigned char>(plan[at]); };
  std::uint64_t said = 0;
  for (std::size_t i = 8; i-- > 0;) said = said << 8 | byte(16 + i);
  if (said != plan.size()) {
    return {"the plan is truncated: " + size + " bytes, its header says " + std::to_string(said) + "; copy it again"};
  }
  std::vector<std::string> reasons, missing;
  std::vector<std::string> parts;
  for (std::size_t at = 24; at < 28; ++at) parts.push_back(std::to_string(byte(at)));
  const std::string version = joined(parts, ".");
  if (!detail::begins(key.library_version + ".", version + ".") && !detail::begins(version + ".", key.library_version + ".")) {
    reasons.push_back("the plan was written by tensorrt_rtx " + version + ", its key says " + key.library_version +
                      "; compile it again");
  }
  if (key.gpu) {
    for (const std::string& name : key.gpu->architectures) {
      const unsigned bit = detail::rtx_bit(name);
      if (bit != 0 && (byte(32) & bit) == 0) missing.push_back(name);
    }
  }
  if (!missing.empty()) {
    reasons.push_back("the plan was not compiled for " + joined(missing) + ", as its key says; compile it again");
  }
  return reasons;
}

namespace detail {

/// Return whether a log has one of these words, with whatever marks between their parts.
inline bool says(const std::string& log, std::initializer_list<const char*> words) {
  std::string text;
  for (const char character : log) {
    if (character != '-' && character != '_' && character != ' ') {
      text += static_cast<char>(std::tolower(static_cast<unsigned char>(character)));
    }
  }
  return std::any_of(words.begin(), words.end(), [&](const char* word) { return text.find(word) != std::string::npos; });
}

}  // namespace detail

/// Return whether TensorRT's log says that memory ran out.
inline bool says_out_of_memory(const std::string& log) {
  return detail::says(log, {"outofmemory", "cudaerrormemoryallocation", "couldnotallocate"});
}

/// Return whether TensorRT's log says that the plan carries host code.
inline bool says_host_code(const std::string& log) { return detail::says(log, {"hostcode", "leanruntime", "versioncompatib"}); }

}  // namespace edge_backbones::plans
