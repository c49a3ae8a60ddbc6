// What an engine's key is compared with: the CPU, the GPU and the engine libraries of this machine.
#pragma once

#include <dlfcn.h>
#include <sys/stat.h>
#include <sys/utsname.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "errors.hpp"

namespace edge_backbones {

/// One GPU as the driver describes it.
struct Gpu {
  int index = 0;
  std::string name;
  std::string architecture;         ///< "sm_90" for compute capability 9.0.
  std::uint64_t memory_bytes = 0;
  std::string driver;               ///< The newest CUDA version that the driver supports: "13.0".
  std::int64_t multiprocessors = 0;
  bool integrated = false;          ///< The GPU shares the memory of the CPU, as on Jetson.
};

/// What decides which engines a machine runs.
struct Host {
  std::string architecture;
  std::vector<std::string> cpu_features;
  std::string device_name;
  std::map<std::string, std::string> versions;  ///< Library version by flavour, of the back ends of this program.
  std::optional<Gpu> gpu;                       ///< The one to run on.
  std::string no_gpu;                           ///< Why there is none.
  bool jetson = false;

  /// Return the version of a library; null if this program was built without it.
  const std::string* version(const std::string& flavour) const {
    const auto found = versions.find(flavour);
    return found == versions.end() ? nullptr : &found->second;
  }
};

/// The instruction sets that matter, out of the text of /proc/cpuinfo; weakest first.
inline std::vector<std::string> cpu_features(const std::string& cpuinfo, const std::string& architecture) {
  static const std::vector<std::string> x86 = {"avx2",        "avx512f",  "avx_vnni", "avx512_vnni", "avx512_bf16",
                                               "avx512_fp16", "amx_bf16", "amx_fp16", "amx_int8"};
  static const std::vector<std::string> arm = {"asimd", "asimdhp", "asimddp", "sve", "bf16", "i8mm"};
  const auto& known = architecture == "x86_64" || architecture == "AMD64" ? x86 : arm;
  std::vector<std::string> flags, found;
  std::istringstream lines(cpuinfo);
  for (std::string line; std::getline(lines, line);) {
    std::string start = line.substr(0, 8);
    for (char& c : start) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    if (start.compare(0, 5, "flags") != 0 && start != "features") continue;
    const std::size_t colon = line.find(':');
    std::istringstream words(colon == std::string::npos ? "" : line.substr(colon + 1));
    for (std::string word; words >> word;) flags.push_back(word);
    break;
  }
  for (const std::string& feature : known) {
    if (std::find(flags.begin(), flags.end(), feature) != flags.end()) found.push_back(feature);
  }
  return found;
}

/// The CPU's model name out of the text of /proc/cpuinfo, or an empty text.
inline std::string device_name(const std::string& cpuinfo) {
  std::istringstream lines(cpuinfo);
  for (std::string line; std::getline(lines, line);) {
    if (line.compare(0, 10, "model name") != 0) continue;
    const std::size_t colon = line.find(':');
    const std::string name = colon == std::string::npos ? "" : line.substr(colon + 1);
    const std::size_t first = name.find_first_not_of(" \t"), last = name.find_last_not_of(" \t");
    return first == std::string::npos ? "" : name.substr(first, last - first + 1);
  }
  return "";
}

namespace detail {

/// Return the text of a small file of the system; "" if it cannot be read.
inline std::string system_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  std::string found = file ? text.str() : std::string();
  const auto is_edge = [](char c) { return c == '\0' || c == ' ' || c == '\n'; };
  while (!found.empty() && is_edge(found.back())) found.pop_back();
  return found;
}

inline bool exists(const std::string& path) {
  struct stat found {};
  return ::stat(path.c_str(), &found) == 0;
}

inline bool is_jetson() {
  return system_file("/sys/devices/soc0/family").compare(0, 5, "Tegra") == 0 || exists("/etc/nv_tegra_release") ||
         system_file("/proc/device-tree/model").find("Jetson") != std::string::npos;
}

/// libcuda, opened with dlopen: a program needs no CUDA toolkit to be told that there is no driver.
class Driver {
 public:
  Driver() : library_(::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) {
    if (library_ != nullptr) return;
    const char* error = ::dlerror();
    const std::string said = error == nullptr ? "" : error;
    why_ = said.find("No such file") != std::string::npos ? "libcuda.so.1 is missing" : "libcuda.so.1 cannot be loaded: " + said;
    if (is_jetson() || exists("/proc/driver/nvidia/version")) {
      why_ += "; the kernel has the driver, which a container sees with docker run --runtime nvidia";
    }
    why_ = "no NVIDIA driver (" + why_ + ")";
  }

  /// Return why there is no driver; "" if there is one. The library stays loaded: other code may hold its handles.
  const std::string& why() const { return why_; }

  template <class... Arguments>
  int call(const char* name, Arguments... arguments) const {
    void* symbol = ::dlsym(library_, name);
    if (symbol == nullptr) throw Error(Code::inference, std::string("the NVIDIA driver has no ") + name + ": update the driver");
    return reinterpret_cast<int (*)(Arguments...)>(symbol)(arguments...);
  }

  std::string error_name(int code) const {
    const char* name = nullptr;
    if (call("cuGetErrorName", code, &name) != 0 || name == nullptr) return "CUDA error " + std::to_string(code);
    return name;
  }

  template <class... Arguments>
  void checked(const char* name, Arguments... arguments) const {
    const int code = call(name, arguments...);
    if (code != 0) throw Error(Code::inference, std::string(name) + " failed: " + error_name(code));
  }

 private:
  void* library_;
  std::string why_;
};

inline Gpu describe_gpu(const Driver& driver, int index) {
  Gpu gpu;
  gpu.index = index;
  int device = 0, version = 0;
  char name[256] = {};
  std::size_t bytes = 0;
  driver.checked("cuDeviceGet", &device, index);
  driver.checked("cuDriverGetVersion", &version);
  driver.checked("cuDeviceGetName", name, 256, device);
  driver.checked("cuDeviceTotalMem_v2", &bytes, device);
  const auto attribute = [&](int number) {
    int value = 0;
    driver.checked("cuDeviceGetAttribute", &value, number, device);
    return value;
  };
  name[255] = '\0';
  gpu.name = name;
  gpu.architecture = "sm_" + std::to_string(attribute(75)) + std::to_string(attribute(76));
  gpu.memory_bytes = bytes;
  gpu.driver = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  gpu.multiprocessors = attribute(16);
  gpu.integrated = attribute(18) != 0;
  return gpu;
}

/// Find the GPU of an index, or say in `host.no_gpu` why there is none. Starts the driver in this process.
inline void look_for_gpu(Host& host, int index) {
  const Driver driver;
  host.no_gpu = driver.why();
  if (!host.no_gpu.empty()) return;
  const int code = driver.call("cuInit", 0u);
  int count = 0;
  if (code == 3) {
    host.no_gpu =
        "driver present, and this process was forked from one that uses CUDA, which cannot be used here: start workers with "
        "the 'spawn' method";
  } else if (code != 0) {
    host.no_gpu = "driver present, cuInit failed: " + driver.error_name(code);
  } else if (const int failed = driver.call("cuDeviceGetCount", &count)) {
    host.no_gpu = "driver present, cuDeviceGetCount failed: " + driver.error_name(failed);
  } else if (count == 0) {
    host.no_gpu = "driver present, no GPU is visible to this process (CUDA_VISIBLE_DEVICES?)";
  } else if (index < 0 || index >= count) {
    host.no_gpu = "this machine has " + std::to_string(count) + " GPUs, and none is cuda:" + std::to_string(index);
  } else {
    host.gpu = describe_gpu(driver, index);
  }
}

}  // namespace detail

/// Read this machine, and the GPU of index `gpu` if one is meant.
inline Host this_host(std::map<std::string, std::string> versions, std::optional<int> gpu = std::nullopt) {
  Host host;
  struct utsname names {};
  if (::uname(&names) == 0) host.architecture = names.machine;
  const std::string cpuinfo = detail::system_file("/proc/cpuinfo");
  host.cpu_features = cpu_features(cpuinfo, host.architecture);
  host.device_name = device_name(cpuinfo);
  if (host.device_name.empty()) host.device_name = host.architecture;
  host.versions = std::move(versions);
  host.jetson = detail::is_jetson();
  if (gpu) detail::look_for_gpu(host, *gpu);
  return host;
}

}  // namespace edge_backbones
