// Write the frames of a camera into shared memory, and read the feature maps that backbone.py puts there.
//
//     cmake -S examples/shared_memory -B build && cmake --build build
//     build/camera /camera 480 640 --frames 100 --rate 30
//
// The camera is a test picture that moves. Each map that comes back is checked: it says which frame it is of, and the sum of
// the bytes that Python saw, which has to be that of the bytes written here.
#include "segment.hpp"

#include <sys/mman.h>
#include <sys/stat.h>

#include <charconv>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

volatile std::sig_atomic_t interrupted = 0;

constexpr std::uint64_t kMostPixels = 16384;  // in a row or a column

struct Options {
  std::string name;
  std::uint32_t height = 0;
  std::uint32_t width = 0;
  std::uint64_t frames = 100;
  double rate = 30;
  std::uint64_t map_bytes = 4 << 20;
  double wait_s = 60;  // for a backbone to begin, and for the last map
  std::string save;    // file for the last map
};

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what + ": " + std::strerror(errno)); }

std::uint64_t up_to_page(std::uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// The shared memory, which this process makes and removes.
class Segment {
 public:
  explicit Segment(const Options& options) : name_(options.name) {
    remove_of_dead_camera();
    file_ = shm_open(name_.c_str(), O_CREAT | O_EXCL | O_RDWR, 0600);
    if (file_ < 0) fail("shm_open(" + name_ + ")");
    const std::uint64_t frame = std::uint64_t{options.height} * options.width * 3;
    const std::uint64_t pitch = up_to_page(frame);
    bytes_ = kPage + kSlots * pitch + up_to_page(options.map_bytes);
    // Unlike ftruncate, it takes the memory now: a container may have less than is mapped, and ends who writes there.
    errno = posix_fallocate(file_, 0, static_cast<off_t>(bytes_));
    void* memory = errno ? MAP_FAILED : mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
    if (memory == MAP_FAILED) {
      const int cause = errno;
      shm_unlink(name_.c_str());
      errno = cause;
      fail(std::to_string(bytes_) + " bytes of shared memory for " + name_ + " (docker run --shm-size gives more)");
    }
    base_ = static_cast<unsigned char*>(memory);
    Header& header = *new (base_) Header();  // the file is zeros
    header.version = kVersion;
    header.slots = kSlots;
    header.height = options.height;
    header.width = options.width;
    header.channels = 3;
    header.frames_offset = kPage;
    header.frame_pitch = pitch;
    header.map_offset = kPage + kSlots * pitch;
    header.map_bytes = options.map_bytes;
    if (!lock_byte(file_, kCameraLives, false)) fail("locking " + name_);
    header.magic.store(kMagic, std::memory_order_release);
  }

  ~Segment() {
    munmap(base_, bytes_);
    shm_unlink(name_.c_str());
    close(file_);  // frees the locks
  }

  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  Header& header() const { return *reinterpret_cast<Header*>(base_); }
  unsigned char* frame(std::uint32_t slot) const {
    return base_ + header().frames_offset + slot * header().frame_pitch;
  }
  const float* feature_map() const { return reinterpret_cast<const float*>(base_ + header().map_offset); }
  int file() const { return file_; }

 private:
  void remove_of_dead_camera() const {
    const int old = shm_open(name_.c_str(), O_RDWR, 0);
    if (old < 0) return;
    const bool lives = is_locked(old, kCameraLives);
    close(old);
    if (lives) throw std::runtime_error(name_ + " belongs to a camera that runs: choose another name");
    shm_unlink(name_.c_str());
  }

  std::string name_;
  int file_ = -1;
  std::uint64_t bytes_ = 0;
  unsigned char* base_ = nullptr;
};

// Fill a frame with the test picture of its number; return the sum of its bytes.
std::uint64_t draw(unsigned char* pixels, const Header& header, std::uint64_t number) {
  std::uint64_t sum = 0;
  for (std::uint64_t row = 0; row < header.height; ++row) {
    for (std::uint64_t column = 0; column < header.width; ++column) {
      for (std::uint64_t channel = 0; channel < 3; ++channel) {
        const auto value = static_cast<unsigned char>(3 * row + 5 * column + 7 * channel * row + 11 * number);
        *pixels++ = value;
        sum += value;
      }
    }
  }
  return sum;
}

// Write a frame into a slot that nobody uses. Returns the sum of its bytes.
std::uint64_t write_frame(const Segment& segment, std::uint64_t number) {
  Header& header = segment.header();
  const std::uint64_t newest = header.newest.load(std::memory_order_relaxed);
  for (;;) {
    for (std::uint32_t index = 0; index < kSlots; ++index) {
      Slot& slot = header.slot[index];
      const bool is_newest = newest != 0 && slot.number.load(std::memory_order_relaxed) == newest;
      if (is_newest || !lock_byte(segment.file(), index, false)) continue;
      slot.number.store(0, std::memory_order_relaxed);
      slot.checksum = draw(segment.frame(index), header, number);
      slot.number.store(number, std::memory_order_release);
      const std::uint64_t sum = slot.checksum;
      unlock_byte(segment.file(), index);
      header.newest.store(number, std::memory_order_release);
      return sum;
    }
    std::this_thread::yield();  // a second reader has a slot too
  }
}

// The map that came back last: which frame it is of, and its values. Number 0: there is none.
struct Answer {
  std::uint64_t number = 0;
  std::uint64_t checksum = 0;
  std::vector<std::uint32_t> shape;
  std::vector<float> values;
};

Answer read_map(const Segment& segment, std::uint64_t after) {
  Header& header = segment.header();
  Answer answer;
  if (header.map_of.load(std::memory_order_acquire) == after) return answer;
  if (!lock_byte(segment.file(), kMapByte, true)) fail("locking the map");
  const std::uint64_t number = header.map_of.load(std::memory_order_relaxed);
  const std::uint64_t room = header.map_bytes / sizeof(float);
  std::uint64_t count = 1;
  bool fits = true;
  for (const std::uint32_t size : header.map_shape) {
    fits = fits && size != 0 && size <= room / count;
    if (fits) count *= size;
  }
  if (number != 0 && fits) {
    answer.number = number;
    answer.checksum = header.map_checksum;
    answer.shape.assign(header.map_shape, header.map_shape + 4);
    answer.values.assign(segment.feature_map(), segment.feature_map() + count);
  }
  unlock_byte(segment.file(), kMapByte);
  if (number != 0 && !fits) throw std::runtime_error("the map is larger than its place in the shared memory");
  return answer;
}

// Print a map; throw if it is not of the frame that it says, or not finite.
void check(const Answer& answer, const std::map<std::uint64_t, std::uint64_t>& written) {
  const std::string frame = "frame " + std::to_string(answer.number);
  const auto found = written.find(answer.number);
  if (found == written.end()) throw std::runtime_error("a map of " + frame + ", which was not written");
  if (found->second != answer.checksum) throw std::runtime_error(frame + " was torn: its checksum differs");
  double sum = 0;
  for (const float value : answer.values) sum += value;
  if (!std::isfinite(sum)) throw std::runtime_error("the map of " + frame + " is not finite");
  const auto& shape = answer.shape;
  std::printf("%s: checksum fits, map %ux%ux%ux%u, mean %.6g\n", frame.c_str(), shape[0], shape[1], shape[2], shape[3],
              sum / static_cast<double>(answer.values.size()));
  std::fflush(stdout);
}

int run(const Options& options) {
  const Segment segment(options);
  Header& header = segment.header();
  const auto pause = std::chrono::milliseconds(1);
  const auto wait = std::chrono::duration<double>(options.wait_s);
  std::printf("waiting for backbone.py at %s\n", options.name.c_str());
  std::fflush(stdout);
  const auto begun = Clock::now();
  while (!interrupted && !is_locked(segment.file(), kBackboneLives)) {
    if (Clock::now() - begun > wait) throw std::runtime_error("no backbone.py came: start it with the same name");
    std::this_thread::sleep_for(pause);
  }

  std::map<std::uint64_t, std::uint64_t> written;
  Answer last;
  bool lives = true;
  const auto take_answer = [&] {
    Answer answer = read_map(segment, last.number);
    if (answer.number == 0) return;
    check(answer, written);
    written.erase(written.begin(), written.lower_bound(answer.number));
    last = std::move(answer);
  };
  auto next = Clock::now();
  for (std::uint64_t number = 1; number <= options.frames && !interrupted; ++number) {
    written[number] = write_frame(segment, number);
    next += std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(1 / options.rate));
    do {
      take_answer();
      std::this_thread::sleep_for(pause);
    } while (Clock::now() < next && !interrupted);
    const bool lives_now = is_locked(segment.file(), kBackboneLives);
    if (lives && !lives_now) std::fprintf(stderr, "camera: backbone.py is gone; frames go on\n");
    lives = lives_now;
  }
  header.ended = 1;
  const auto ended = Clock::now();
  while (!interrupted && is_locked(segment.file(), kBackboneLives) && Clock::now() - ended < wait) {
    if (last.number == header.newest.load()) break;
    take_answer();
    std::this_thread::sleep_for(pause);
  }
  take_answer();
  if (interrupted) return 130;
  if (last.number == 0) throw std::runtime_error("no map came back");
  if (!options.save.empty()) {
    std::ofstream file(options.save, std::ios::binary);
    const auto bytes = static_cast<std::streamsize>(last.values.size() * sizeof(float));
    file.write(reinterpret_cast<const char*>(&last.number), sizeof last.number);
    file.write(reinterpret_cast<const char*>(last.values.data()), bytes);
    if (!file) fail("writing " + options.save);
  }
  std::printf("the last map is of frame %llu of %llu\n", static_cast<unsigned long long>(last.number),
              static_cast<unsigned long long>(header.newest.load()));
  return 0;
}

// Return the whole number of a word; throw for another word, and for a number above `most`.
std::uint64_t whole(const std::string& what, const std::string& word, std::uint64_t most) {
  std::uint64_t value = 0;
  const char* end = word.data() + word.size();
  const auto [last, error] = std::from_chars(word.data(), end, value);
  if (error != std::errc() || last != end || value > most) {
    throw std::runtime_error(what + " is a whole number up to " + std::to_string(most) + ", got " + word);
  }
  return value;
}

double decimal(const std::string& what, const std::string& word) {
  char* end = nullptr;
  const double value = std::strtod(word.c_str(), &end);
  if (word.empty() || *end != '\0' || !std::isfinite(value)) {
    throw std::runtime_error(what + " is a number, got " + word);
  }
  return value;
}

Options parse(const std::vector<std::string>& words) {
  if (words.size() < 3 || words.size() % 2 == 0) {
    throw std::runtime_error(
        "usage: camera /NAME HEIGHT WIDTH [--frames N] [--rate HZ] [--map-bytes N] [--wait S] [--save FILE]");
  }
  Options options;
  options.name = words[0];
  if (options.name.size() < 2 || options.name[0] != '/' || options.name.find('/', 1) != std::string::npos) {
    throw std::runtime_error("the name of the shared memory begins with a slash and has no other: /camera");
  }
  options.height = static_cast<std::uint32_t>(whole("HEIGHT", words[1], kMostPixels));
  options.width = static_cast<std::uint32_t>(whole("WIDTH", words[2], kMostPixels));
  for (std::size_t i = 3; i + 1 < words.size(); i += 2) {
    const std::string& value = words[i + 1];
    if (words[i] == "--frames") options.frames = whole(words[i], value, std::uint64_t{1} << 62);
    else if (words[i] == "--rate") options.rate = decimal(words[i], value);
    else if (words[i] == "--map-bytes") options.map_bytes = whole(words[i], value, std::uint64_t{1} << 40);
    else if (words[i] == "--wait") options.wait_s = decimal(words[i], value);
    else if (words[i] == "--save") options.save = value;
    else throw std::runtime_error("unknown option " + words[i]);
  }
  if (options.height == 0 || options.width == 0) throw std::runtime_error("HEIGHT and WIDTH are at least 1");
  if (!(options.rate > 0)) throw std::runtime_error("--rate is more than 0");
  return options;
}

}  // namespace

int main(int count, char** words) {
  struct sigaction action {};
  action.sa_handler = [](int) { interrupted = 1; };
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  try {
    return run(parse({words + 1, words + count}));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "camera: %s\n", error.what());
    return 1;
  }
}
