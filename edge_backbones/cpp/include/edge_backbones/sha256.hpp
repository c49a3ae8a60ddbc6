// SHA-256 (FIPS 180-4), with the CPU's own instructions for it where x86-64 has them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>
#define EDGE_BACKBONES_SHA_NI 1
#endif

namespace edge_backbones {

namespace detail {

inline constexpr std::uint32_t sha256_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

inline void sha256_plain(std::uint32_t* state, const unsigned char* data, std::size_t blocks) noexcept {
  const auto turn = [](std::uint32_t x, int by) { return (x >> by) | (x << (32 - by)); };
  for (; blocks > 0; --blocks, data += 64) {
    std::uint32_t w[64];
    for (int i = 0; i < 16; ++i) {
      w[i] = static_cast<std::uint32_t>(data[4 * i]) << 24 | static_cast<std::uint32_t>(data[4 * i + 1]) << 16 |
             static_cast<std::uint32_t>(data[4 * i + 2]) << 8 | data[4 * i + 3];
    }
    for (int i = 16; i < 64; ++i) {
      const std::uint32_t s0 = turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ (w[i - 15] >> 3);
      const std::uint32_t s1 = turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ (w[i - 2] >> 10);
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    std::uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    std::uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (int i = 0; i < 64; ++i) {
      const std::uint32_t t1 =
          h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + sha256_constants[i] + w[i];
      const std::uint32_t t2 = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
    state[4] += e, state[5] += f, state[6] += g, state[7] += h;
  }
}

#ifdef EDGE_BACKBONES_SHA_NI
/// Four rounds per pair of instructions; the registers hold ABEF and CDGH, as the instructions want them.
__attribute__((target("sha,sse4.1"))) inline void sha256_instructions(std::uint32_t* state, const unsigned char* data,
                                                                      std::size_t blocks) noexcept {
  const auto at = [](const void* place) { return static_cast<const __m128i*>(place); };
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
  const __m128i cdab = _mm_shuffle_epi32(_mm_loadu_si128(at(state)), 0xb1);
  const __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128(at(state + 4)), 0x1b);
  __m128i abef = _mm_alignr_epi8(cdab, efgh, 8);
  __m128i cdgh = _mm_blend_epi16(efgh, cdab, 0xf0);
  for (; blocks > 0; --blocks, data += 64) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    __m128i words[4];
    for (int i = 0; i < 16; ++i) {
      __m128i now;
      if (i < 4) {
        now = _mm_shuffle_epi8(_mm_loadu_si128(at(data + 16 * i)), big_endian);
      } else {  // w[t] from w[t-16], w[t-15], w[t-7] and w[t-2], four at once
        const __m128i w7 = _mm_alignr_epi8(words[(i + 3) & 3], words[(i + 2) & 3], 4);
        now = _mm_sha256msg1_epu32(words[i & 3], words[(i + 1) & 3]);
        now = _mm_sha256msg2_epu32(_mm_add_epi32(now, w7), words[(i + 3) & 3]);
      }
      words[i & 3] = now;
      const __m128i sum = _mm_add_epi32(now, _mm_loadu_si128(at(sha256_constants + 4 * i)));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  const __m128i feba = _mm_shuffle_epi32(abef, 0x1b), dchg = _mm_shuffle_epi32(cdgh, 0xb1);
  _mm_storeu_si128(static_cast<__m128i*>(static_cast<void*>(state)), _mm_blend_epi16(feba, dchg, 0xf0));
  _mm_storeu_si128(static_cast<__m128i*>(static_cast<void*>(state + 4)), _mm_alignr_epi8(dchg, feba, 8));
}

inline bool cpu_has_sha() noexcept {
  // __builtin_cpu_supports knows "sha" only from GCC 14 on, so ask the CPU: leaf 7, bit 29 of ebx.
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  return ((b >> 29) & 1u) != 0 && __builtin_cpu_supports("sse4.1") != 0;
}
#endif

inline void sha256_blocks(std::uint32_t* state, const unsigned char* data, std::size_t blocks) noexcept {
#ifdef EDGE_BACKBONES_SHA_NI
  static const bool fast = cpu_has_sha();
  if (fast) return sha256_instructions(state, data, blocks);
#endif
  sha256_plain(state, data, blocks);
}

}  // namespace detail

/// Computes the SHA-256 of bytes that come in pieces.
class Sha256 {
 public:
  /// Add bytes.
  void update(const void* data, std::size_t size) noexcept {
    const auto* bytes = static_cast<const unsigned char*>(data);
    total_ += size;
    if (held_ != 0) {
      const std::size_t taken = size < 64 - held_ ? size : 64 - held_;
      std::memcpy(rest_ + held_, bytes, taken);
      held_ += taken, bytes += taken, size -= taken;
      if (held_ < 64) return;
      detail::sha256_blocks(state_, rest_, 1);
      held_ = 0;
    }
    detail::sha256_blocks(state_, bytes, size / 64);
    held_ = size % 64;
    if (held_ != 0) std::memcpy(rest_, bytes + (size - held_), held_);
  }

  /// Return the digest as 64 hex digits. Add no bytes afterwards.
  std::string hex() noexcept {
    const std::uint64_t bits = total_ * 8;
    unsigned char end[72] = {0x80};
    const std::size_t padding = (held_ < 56 ? 56 : 120) - held_;
    for (std::size_t i = 0; i < 8; ++i) end[padding + i] = static_cast<unsigned char>(bits >> (56 - 8 * i));
    update(end, padding + 8);
    std::string digits(64, '0');
    for (std::size_t i = 0; i < 64; ++i) digits[i] = "0123456789abcdef"[(state_[i / 8] >> (28 - 4 * (i % 8))) & 15u];
    return digits;
  }

 private:
  std::uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  unsigned char rest_[64] = {};
  std::size_t held_ = 0;
  std::uint64_t total_ = 0;
};

/// Return the SHA-256 of bytes as 64 hex digits.
inline std::string sha256(const void* data, std::size_t size) {
  Sha256 digest;
  digest.update(data, size);
  return digest.hex();
}

}  // namespace edge_backbones
