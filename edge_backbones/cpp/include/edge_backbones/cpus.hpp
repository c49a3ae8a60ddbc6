// Count the CPUs that this process may use: its affinity mask and the CPU quotas of its cgroups limit them.
//
// The same rules as edge_backbones/cpus.py.
#pragma once

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "host.hpp"

namespace edge_backbones {

namespace detail {

inline std::vector<std::string> split(const std::string& text, char sign) {
  std::vector<std::string> found(1);
  for (const char c : text) {
    if (c == sign) {
      found.emplace_back();
    } else {
      found.back() += c;
    }
  }
  return found;
}

/// Return whether a text is a whole number from 1 of at most 18 digits.
inline bool is_microseconds(const std::string& text) {
  const std::size_t first = text.find_first_not_of('0');
  return !text.empty() && text.find_first_not_of("0123456789") == std::string::npos && first != std::string::npos &&
         text.size() - first <= 18;
}

/// Return quota / period; nothing for "max" and -1, which mean no quota, and for anything that is not two numbers.
inline std::optional<double> ratio(const std::string& quota, const std::string& period) {
  if (!is_microseconds(quota) || !is_microseconds(period)) return std::nullopt;
  return static_cast<double>(std::strtoll(quota.c_str(), nullptr, 10)) /
         static_cast<double>(std::strtoll(period.c_str(), nullptr, 10));
}

/// Replace the octal escapes of /proc/self/mountinfo.
inline std::string unescaped(const std::string& path) {
  std::string found;
  for (std::size_t i = 0; i < path.size(); ++i) {
    const auto octal = [&](std::size_t at) { return at < path.size() && path[at] >= '0' && path[at] <= '7'; };
    if (path[i] == '\\' && octal(i + 1) && octal(i + 2) && octal(i + 3)) {
      found += static_cast<char>(std::strtol(path.substr(i + 1, 3).c_str(), nullptr, 8));
      i += 3;
    } else {
      found += path[i];
    }
  }
  return found;
}

/// Where a hierarchy of cgroups is mounted, and which group the mount shows.
struct Mount {
  std::string kind, shown, point;
};

inline std::vector<Mount> cgroup_mounts(const std::string& mountinfo) {
  std::vector<Mount> found;
  std::istringstream lines(mountinfo);
  for (std::string line; std::getline(lines, line);) {
    const std::size_t middle = line.find(" - ");
    if (middle == std::string::npos) continue;
    const auto fields = split(line.substr(0, middle), ' '), kinds = split(line.substr(middle + 3), ' ');
    if (fields.size() < 5 || kinds.size() < 3 || fields[4].empty() || fields[4][0] != '/') continue;
    const auto options = split(kinds[2], ',');
    const bool v1 = kinds[0] == "cgroup" && std::find(options.begin(), options.end(), "cpu") != options.end();
    if (v1 || kinds[0] == "cgroup2") found.push_back({kinds[0], unescaped(fields[3]), unescaped(fields[4])});
  }
  return found;
}

/// Return the part of a group's path below the group that a mount shows; nothing outside of it.
inline std::vector<std::string> parts_below(const std::string& group, const std::string& shown) {
  const auto parts = [](const std::string& path) {
    std::vector<std::string> found;
    for (const std::string& part : split(path, '/')) {
      if (!part.empty() && part != ".") found.push_back(part);
    }
    return found;
  };
  const auto whole = parts(group), top = parts(shown);
  const bool inside = whole.size() >= top.size() && std::equal(top.begin(), top.end(), whole.begin()) &&
                      std::find(whole.begin(), whole.end(), "..") == whole.end();
  if (!inside) return {};
  return std::vector<std::string>(whole.begin() + static_cast<std::ptrdiff_t>(top.size()), whole.end());
}

}  // namespace detail

/// Return the smallest CPU quota of this process's cgroups and of their parents, in CPUs; nothing without a quota.
///
/// `root`: root folder of the files; tests pass a copy of another machine's.
inline std::optional<double> cpu_quota(const std::string& root = "") {
  const auto mounts = detail::cgroup_mounts(detail::system_file(root + "/proc/self/mountinfo"));
  std::optional<double> least;
  const auto take = [&](const std::optional<double>& quota) {
    if (quota) least = least ? std::min(*least, *quota) : *quota;
  };
  std::istringstream lines(detail::system_file(root + "/proc/self/cgroup"));
  for (std::string line; std::getline(lines, line);) {
    const std::size_t first = line.find(':'), second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const auto names = detail::split(controllers, ',');
    const bool v1 = std::find(names.begin(), names.end(), "cpu") != names.end();
    const std::string kind = line.substr(0, first) == "0" && controllers.empty() ? "cgroup2" : v1 ? "cgroup" : "";
    const auto mount = std::find_if(mounts.rbegin(), mounts.rend(), [&](const auto& one) { return one.kind == kind; });
    if (mount == mounts.rend()) continue;
    auto below = detail::parts_below(line.substr(second + 1), mount->shown);
    while (true) {
      std::string folder = root + mount->point;
      for (const std::string& part : below) folder += "/" + part;
      const auto v2 = detail::split(detail::system_file(folder + "/cpu.max"), ' ');
      if (v2.size() == 2) take(detail::ratio(v2[0], v2[1]));
      take(detail::ratio(detail::system_file(folder + "/cpu.cfs_quota_us"), detail::system_file(folder + "/cpu.cfs_period_us")));
      if (below.empty()) break;
      below.pop_back();
    }
  }
  return least;
}

/// Return how many threads can compute all the time if this process may use fewer CPUs than the machine has; 0 if nothing
/// limits it. A quota is rounded down.
inline int cpu_limit(const std::string& root = "") {
  const int machine = std::max(1, static_cast<int>(::sysconf(_SC_NPROCESSORS_ONLN)));
  int allowed = machine;
  for (int most = 1024; most <= (1 << 20); most *= 2) {
    cpu_set_t* mask = CPU_ALLOC(static_cast<std::size_t>(most));
    if (mask == nullptr) break;
    const std::size_t bytes = CPU_ALLOC_SIZE(static_cast<std::size_t>(most));
    const bool known = ::sched_getaffinity(0, bytes, mask) == 0;
    if (known) allowed = CPU_COUNT_S(bytes, mask);
    CPU_FREE(mask);
    if (known) break;
  }
  const auto quota = cpu_quota(root);
  const int usable = quota ? std::min(allowed, std::max(1, static_cast<int>(std::min(std::floor(*quota), 1e6)))) : allowed;
  return usable < machine ? usable : 0;
}

}  // namespace edge_backbones
