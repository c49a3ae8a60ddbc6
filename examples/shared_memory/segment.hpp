// The POSIX shared memory that camera.cpp writes and backbone.py maps: a header, three frames, one feature map.
//
// A frame is worked on where it lies, for as long as an inference takes. So the camera must not write there meanwhile, and must
// not wait either: of three slots one holds the newest frame, one may be in use, and one is free to write to.
//
// Who uses a slot holds a record lock of fcntl(2) on the byte of the shared memory that has the slot's number. Python has
// these locks, they order the memory of the two processes, and the kernel frees them when a process dies. One more byte is
// locked by each process for as long as it lives: the other one sees whether it does.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>

constexpr std::uint64_t kMagic = 0x3153454741424545;  // "EEBAGES1"
constexpr std::uint32_t kVersion = 1;
constexpr std::uint32_t kSlots = 3;
constexpr std::uint64_t kPage = 4096;

// What the bytes stand for that are locked. Bytes 0 to 2: a slot.
enum LockedByte : off_t { kMapByte = 3, kCameraLives = 4, kBackboneLives = 5 };

struct Slot {
  std::atomic<std::uint64_t> number;  // of the frame, from 1; 0 while it is written
  std::uint64_t checksum;             // the sum of its bytes
};

struct Header {
  std::atomic<std::uint64_t> magic;  // is written last
  std::uint32_t version;
  std::uint32_t slots;
  std::uint32_t height;
  std::uint32_t width;
  std::uint32_t channels;
  std::uint32_t ended;  // 1 after the last frame
  std::uint64_t frames_offset;
  std::uint64_t frame_pitch;  // bytes from one slot to the next
  std::uint64_t map_offset;
  std::uint64_t map_bytes;             // room for the map
  std::atomic<std::uint64_t> newest;   // number of the newest complete frame; 0 before the first
  Slot slot[kSlots];                   // frame n is in slot[n % kSlots] or in another one: look at the numbers
  std::atomic<std::uint64_t> map_of;   // number of the frame that the map is of; 0 before the first
  std::uint64_t map_checksum;          // of that frame, as backbone.py saw it
  std::uint32_t map_shape[4];          // float32 NCHW
};

static_assert(std::atomic<std::uint64_t>::is_always_lock_free, "atomics in shared memory need no lock");
static_assert(offsetof(Header, newest) == 64 && offsetof(Header, slot) == 72, "backbone.py reads these offsets");
static_assert(offsetof(Header, map_of) == 120 && sizeof(Header) == 152, "backbone.py reads these offsets");

// Take the lock of a byte. Without `wait`, return false if another process holds it.
inline bool lock_byte(int file, off_t byte, bool wait) {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  int result = 0;
  do {
    result = fcntl(file, wait ? F_SETLKW : F_SETLK, &lock);
  } while (result != 0 && errno == EINTR);
  return result == 0;
}

inline void unlock_byte(int file, off_t byte) {
  struct flock lock {};
  lock.l_type = F_UNLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  fcntl(file, F_SETLK, &lock);
}

// Return whether another process holds the lock of a byte.
inline bool is_locked(int file, off_t byte) {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  return fcntl(file, F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}
