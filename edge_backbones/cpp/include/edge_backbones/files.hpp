// Read the files of a bundle, which a stranger may have made: no links, pipes or devices, no more bytes than expected.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "errors.hpp"
#include "manifest.hpp"
#include "sha256.hpp"

namespace edge_backbones {

namespace detail {

/// Why the system refused a file. `number`: errno.
struct FileError {
  int number;
  std::string why;
};

inline std::string system_text(int number) { return std::generic_category().message(number); }

/// An open file, closed at the end of its scope.
class Descriptor {
 public:
  explicit Descriptor(int number) noexcept : number_(number) {}
  ~Descriptor() {
    if (number_ >= 0) ::close(number_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const noexcept { return number_; }

 private:
  int number_;
};

/// Open a regular file that is no link, and return it with its size. Throws FileError.
inline std::pair<int, std::uint64_t> open_file(const std::string& path) {
  if (path.find('\0') != std::string::npos) throw FileError{EINVAL, "embedded null byte"};
  const int number = ::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC);
  if (number < 0) {
    const int error = errno;
    if (error == ELOOP) throw FileError{error, "it is a link, and links are not followed"};
    if (error == ENXIO) throw FileError{error, "it is no regular file"};
    throw FileError{error, system_text(error)};
  }
  struct stat found {};
  if (::fstat(number, &found) != 0 || !S_ISREG(found.st_mode)) {
    ::close(number);
    throw FileError{EINVAL, S_ISDIR(found.st_mode) ? "it is a folder" : "it is no regular file"};
  }
  return {number, static_cast<std::uint64_t>(found.st_size)};
}

/// Hashes bytes in a thread of its own while they are still being read: an engine may have hundreds of megabytes.
///
/// Small files, and files where no thread can be started, are hashed by `finish`.
class Hasher {
 public:
  Hasher(const char* data, std::size_t size) : data_(data) {
    if (size < (std::size_t{4} << 20)) return;
    try {
      thread_ = std::thread([this] { follow(); });
    } catch (const std::system_error&) {  // this process has no threads left
    }
  }
  Hasher(const Hasher&) = delete;
  Hasher& operator=(const Hasher&) = delete;
  ~Hasher() { join(); }

  /// Say that the first `count` bytes are there.
  void publish(std::size_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ready_ = count;
    more_.notify_one();
  }

  /// Return the SHA-256 of the bytes that were published, as hex digits.
  std::string finish() {
    join();
    digest_.update(data_ + hashed_, ready_ - hashed_);
    hashed_ = ready_;
    return digest_.hex();
  }

 private:
  void follow() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      more_.wait(lock, [this] { return ready_ > hashed_ || ended_; });
      if (ready_ == hashed_) return;
      const std::size_t until = ready_;
      lock.unlock();
      digest_.update(data_ + hashed_, until - hashed_);
      lock.lock();
      hashed_ = until;
    }
  }

  void join() {
    if (!thread_.joinable()) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
      more_.notify_one();
    }
    thread_.join();
  }

  const char* data_;
  std::mutex mutex_;
  std::condition_variable more_;
  std::size_t ready_ = 0, hashed_ = 0;
  bool ended_ = false;
  Sha256 digest_;
  std::thread thread_;
};

/// Return up to `size` bytes of an open file, fewer if it ends before, and their SHA-256 if `digest` is not null.
///
/// Throws FileError.
inline std::vector<char> read_bytes(int file, std::size_t size, std::string* digest = nullptr) {
  constexpr std::size_t piece = std::size_t{1} << 20;
  std::vector<char> data(size);
  Hasher hasher(data.data(), digest == nullptr ? 0 : size);
  std::size_t count = 0;
  while (count < size) {
    const ssize_t now = ::read(file, data.data() + count, std::min(piece, size - count));
    if (now < 0 && errno == EINTR) continue;
    if (now < 0) throw FileError{errno, system_text(errno)};
    if (now == 0) break;
    count += static_cast<std::size_t>(now);
    if (digest != nullptr) hasher.publish(count);
  }
  if (digest != nullptr) *digest = hasher.finish();
  data.resize(count);
  return data;
}

/// Return a folder's path with a file's name behind it, as Python's pathlib writes it.
inline std::string below(const std::string& folder, const std::string& path) {
  if (folder == "." || folder.empty()) return path;
  return folder.back() == '/' ? folder + path : folder + "/" + path;
}

/// Return a path without "./", doubled and trailing slashes, as Python's pathlib writes it.
inline std::string normal_path(const std::string& path) {
  std::string found = !path.empty() && path[0] == '/' ? "/" : "";
  for (std::size_t at = 0; at < path.size();) {
    std::size_t end = path.find('/', at);
    if (end == std::string::npos) end = path.size();
    const std::string part = path.substr(at, end - at);
    if (!part.empty() && part != ".") found += (found.empty() || found.back() == '/' ? "" : "/") + part;
    at = end + 1;
  }
  return found.empty() ? "." : found;
}

}  // namespace detail

/// Return the path of a file on disk. Throws Code::manifest for a path that leaves the folder or goes through a link.
inline std::string place_of(const std::string& folder, const FileRecord& record) {
  bool plain = record.path.find_first_of("\\:") == std::string::npos && is_printable(record.path);
  std::string place = folder;
  std::vector<std::string> places;
  for (std::size_t at = 0; at <= record.path.size();) {
    std::size_t end = record.path.find('/', at);
    if (end == std::string::npos) end = record.path.size();
    const std::string part = record.path.substr(at, end - at);
    plain = plain && !part.empty() && part != "." && part != "..";
    place = detail::below(place, part);
    places.push_back(place);
    at = end + 1;
  }
  if (!plain) {
    throw Error(Code::manifest, detail::below(folder, "manifest.json") + " names " + quoted(shortened(record.path, 120)) +
                                    ", which is not a plain path inside the bundle: refused");
  }
  for (const std::string& one : places) {
    struct stat found {};
    if (::lstat(one.c_str(), &found) != 0) break;  // it is missing, and so is everything below it
    if (S_ISLNK(found.st_mode)) {
      throw Error(Code::manifest, shortened(one, 300) +
                                      " is a link, which may lead outside of the bundle: refused. Put what it leads to in its "
                                      "place");
    }
  }
  return place;
}

/// Return the bytes of a file of a bundle after comparing their size and SHA-256 with the manifest. Throws Code::integrity.
inline std::vector<char> read_checked(const std::string& folder, const FileRecord& record) {
  const std::string repair = "copy the bundle again or build it again";
  const std::string path = place_of(folder, record);
  std::vector<char> data;
  std::string digest;
  try {
    const auto [number, size] = detail::open_file(path);
    const detail::Descriptor file(number);
    if (size != record.size) {
      throw Error(Code::integrity, path + " has " + std::to_string(size) + " bytes, the manifest says " +
                                       std::to_string(record.size) + ": " + repair);
    }
    data = detail::read_bytes(file.get(), static_cast<std::size_t>(size), &digest);
  } catch (const detail::FileError& error) {
    if (error.number == ENOENT) throw Error(Code::integrity, path + " is missing: " + repair);
    throw Error(Code::integrity, path + " cannot be read: " + error.why);
  } catch (const std::bad_alloc&) {
    throw Error(Code::integrity,
                path + " does not fit into the memory that is free: it has " + std::to_string(record.size) + " bytes");
  }
  if (digest != record.sha256) {
    throw Error(Code::integrity, path + " was changed: SHA-256 " + digest.substr(0, 12) + "..., the manifest says " +
                                     record.sha256.substr(0, 12) + "...: " + repair);
  }
  return data;
}

}  // namespace edge_backbones
