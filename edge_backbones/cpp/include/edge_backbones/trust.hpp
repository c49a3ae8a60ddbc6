// Whether this machine or its user asks for signed bundles. This library checks no signatures, so it refuses bundles there.
#pragma once

#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <string>

#include "errors.hpp"
#include "files.hpp"

namespace edge_backbones {

/// The folder with the public keys that a machine trusts, as in edge_backbones/bundle/trust.py.
inline constexpr const char* machine_keys = "/etc/edge_backbones/trusted";

namespace detail {

/// Return the user's home folder, as Python's Path.home(): an empty HOME is "/". "" if there is none.
inline std::string home_folder() {
  const char* home = std::getenv("HOME");
  if (home != nullptr) return *home == '\0' ? "/" : home;
  const struct passwd* user = ::getpwuid(::getuid());
  return user == nullptr || user->pw_dir == nullptr ? "" : user->pw_dir;
}

/// Return whether something has this path; throw Code::bundle if that cannot be told, since it may ask for a signature.
inline bool is_there(const std::string& path) {
  struct stat found {};
  if (::lstat(path.c_str(), &found) == 0) return true;
  if (errno == ENOENT || errno == ENOTDIR) return false;
  throw Error(Code::bundle, path + " may hold the keys that are trusted here, and cannot be read: " + system_text(errno));
}

}  // namespace detail

/// Return the folder of trusted keys that asks for signed bundles here; "" if none does.
inline std::string asks_for_signature() {
  const std::string home = detail::home_folder();
  const std::string of_user = home.empty() ? "" : detail::below(detail::normal_path(home), ".config/edge_backbones/trusted");
  if (detail::is_there(machine_keys)) return machine_keys;
  return !of_user.empty() && detail::is_there(of_user) ? of_user : "";
}

/// Throw Code::bundle if this machine or its user asks for signed bundles.
inline void refuse_unchecked_signature(const std::string& bundle) {
  const std::string folder = asks_for_signature();
  if (folder.empty()) return;
  throw Error(Code::bundle, folder + " asks for signed bundles, and the C++ library checks no signatures: run edge-backbones verify " +
                                bundle + " --key " + folder +
                                " before this program, and set Options::signature_checked = true");
}

}  // namespace edge_backbones
