// The error that this library throws: one class, whose code says what kind it is.
//
// A message is one line. It says what was wrong, with both values, and how to fix it. The codes have the names of the classes
// in edge_backbones/errors.py.
#pragma once

#include <stdexcept>
#include <string>

#include "text.hpp"

namespace edge_backbones {

/// What kind of error this is. The names of Python's classes are in the comments.
enum class Code {
  bundle,              ///< The folder is not a bundle (BundleError).
  manifest,            ///< manifest.json does not follow the bundle format (ManifestError).
  integrity,           ///< A file is missing, truncated, changed or outside the folder (IntegrityError).
  engine_mismatch,     ///< No engine of the bundle can run on this machine (EngineMismatchError).
  input,               ///< An argument cannot be used: an input array, a stage, an option (InputError).
  inference,           ///< A loaded engine failed while it ran (InferenceError).
  missing_dependency,  ///< The program was built without the library that an engine needs (MissingDependencyError).
};

/// Return the name of Python's class for a code, such as "ManifestError".
inline const char* name_of(Code code) noexcept {
  switch (code) {
    case Code::bundle: return "BundleError";
    case Code::manifest: return "ManifestError";
    case Code::integrity: return "IntegrityError";
    case Code::engine_mismatch: return "EngineMismatchError";
    case Code::input: return "InputError";
    case Code::inference: return "InferenceError";
    case Code::missing_dependency: return "MissingDependencyError";
  }
  return "EdgeBackbonesError";
}

/// Every error that this library throws on purpose.
///
/// The message is safe to print in a terminal: control characters in names from a bundle are escaped. Anything else that
/// escapes from this library, except std::bad_alloc, is a fault of it.
class Error : public std::runtime_error {
 public:
  Error(Code code, const std::string& message) : std::runtime_error(visible(message)), code_(code) {}

  /// Return what kind of error this is.
  Code code() const noexcept { return code_; }

 private:
  Code code_;
};

}  // namespace edge_backbones
