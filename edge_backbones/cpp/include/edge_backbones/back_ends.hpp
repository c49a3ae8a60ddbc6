// Which libraries this program runs engines with.
//
// CMake's targets say it: edge_backbones::openvino defines EDGE_BACKBONES_WITH_OPENVINO, and the header of that library is
// included here. All files of one program have to be compiled with the same definitions, which linking the targets to the
// whole program does. Without CMake, define them for every file, or leave them out, include openvino.hpp where a bundle is
// opened, and pass Options::back_ends.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "session.hpp"

#ifdef EDGE_BACKBONES_WITH_OPENVINO
#include "openvino.hpp"
#endif
#if defined(EDGE_BACKBONES_WITH_TENSORRT) || defined(EDGE_BACKBONES_WITH_TENSORRT_RTX)
#include "tensorrt.hpp"
#endif
#ifdef EDGE_BACKBONES_WITH_LIBTORCH
#include "libtorch.hpp"
#endif

namespace edge_backbones {

/// Return the back ends that this program was compiled with.
inline std::vector<BackEnd> default_back_ends() {
  std::vector<BackEnd> found;
#ifdef EDGE_BACKBONES_WITH_TENSORRT
  found.push_back(tensorrt_back_end());
#endif
#ifdef EDGE_BACKBONES_WITH_TENSORRT_RTX
  found.push_back(tensorrt_rtx_back_end());
#endif
#ifdef EDGE_BACKBONES_WITH_OPENVINO
  found.push_back(openvino_back_end());
#endif
#ifdef EDGE_BACKBONES_WITH_LIBTORCH
  found.push_back(libtorch_back_end());
#endif
  return found;
}

/// Return the version of each library by flavour; libraries that cannot be used here are left out.
inline std::map<std::string, std::string> versions_of(const std::vector<BackEnd>& back_ends) {
  std::map<std::string, std::string> found;
  for (const BackEnd& one : back_ends) {
    const std::string version = one.version == nullptr ? "" : one.version();
    if (!version.empty()) found[one.flavour] = version;
  }
  return found;
}

}  // namespace edge_backbones
