// The outputs of one call, in memory of their own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "types.hpp"

namespace edge_backbones {

namespace detail {

struct FreeLater {
  void operator()(char* memory) const noexcept { ::operator delete[](memory, std::align_val_t{64}); }
};
using Memory = std::unique_ptr<char[], FreeLater>;

/// Memory that calls have released, by size, for the next call: a loop over frames allocates nothing.
class MemoryPool {
 public:
  Memory take(std::size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto one = free_.begin(); one != free_.end(); ++one) {
        if (one->first != bytes) continue;
        Memory found = std::move(one->second);
        free_.erase(one);
        return found;
      }
    }
    return Memory(static_cast<char*>(::operator new[](bytes == 0 ? 1 : bytes, std::align_val_t{64})));
  }

  /// Keep memory for the next call. If the pool is full, the oldest goes: callers may have changed to another size.
  void give_back(std::size_t bytes, Memory memory) noexcept {
    Memory oldest;  // freed after the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    if (most_ == 0) return;
    if (free_.size() == most_) {
      oldest = std::move(free_.front().second);
      free_.erase(free_.begin());
    }
    free_.emplace_back(bytes, std::move(memory));
  }

  /// `most`: how many pieces of memory are kept, at least 1.
  explicit MemoryPool(std::size_t most) : most_(most) { free_.reserve(most); }

 private:
  std::mutex mutex_;
  std::size_t most_;
  std::vector<std::pair<std::size_t, Memory>> free_;
};

}  // namespace detail

/// One output: a name, and values that this object owns.
class FeatureMap {
 public:
  std::string name;
  DType dtype = DType::float32;
  Shape shape;                        ///< As callers see it: NCHW for a map in channels-last memory too.
  std::vector<std::int64_t> strides;  ///< In elements.

  /// Return the values. Throws Code::input if `T` (float or Half) is not the dtype.
  template <class T>
  const T* data() const {
    return tensor().as<T>();
  }
  template <class T>
  T* data() {
    return Tensor(memory_.get(), dtype, shape, strides).as<T>();
  }

  /// Return the map as a tensor over this object's memory.
  ConstTensor tensor() const { return ConstTensor(memory_.get(), dtype, shape, strides); }

  /// Return the value at (n, c, h, w), or whatever axes the map has, as a float.
  float at(std::initializer_list<std::int64_t> index) const {
    std::int64_t offset = 0;
    std::size_t axis = 0;
    if (index.size() != shape.size()) throw Error(Code::input, name + " has " + std::to_string(shape.size()) + " axes");
    for (const std::int64_t i : index) {
      if (i < 0 || i >= shape[axis]) throw Error(Code::input, "an index is outside of " + name + ", " + text_of(shape));
      offset += i * strides[axis++];
    }
    return dtype == DType::float16 ? data<Half>()[offset].to_float() : data<float>()[offset];
  }

  FeatureMap(std::string name_, DType dtype_, Shape shape_, std::vector<std::int64_t> strides_,
             std::shared_ptr<detail::MemoryPool> pool)
      : name(std::move(name_)), dtype(dtype_), shape(std::move(shape_)), strides(std::move(strides_)), pool_(std::move(pool)) {
    bytes_ = size_of(shape) * bytes_of(dtype);
    memory_ = pool_->take(bytes_);
  }
  FeatureMap(FeatureMap&&) noexcept = default;
  FeatureMap& operator=(FeatureMap&& other) noexcept {
    FeatureMap old(std::move(*this));  // gives its memory back
    name = std::move(other.name), dtype = other.dtype, shape = std::move(other.shape), strides = std::move(other.strides);
    pool_ = std::move(other.pool_), bytes_ = other.bytes_, memory_ = std::move(other.memory_);
    return *this;
  }
  ~FeatureMap() {
    if (memory_) pool_->give_back(bytes_, std::move(memory_));
  }

 private:
  std::shared_ptr<detail::MemoryPool> pool_;
  std::size_t bytes_ = 0;
  detail::Memory memory_;
};

/// The outputs of one call: the feature maps of the chosen stages in stage order, then class tokens and hidden states.
///
/// They own their memory and outlive the backbone. Memory of destroyed maps is used again by later calls.
class FeatureMaps {
 public:
  explicit FeatureMaps(std::vector<FeatureMap>&& maps) : maps_(std::move(maps)) {}

  std::size_t size() const noexcept { return maps_.size(); }
  auto begin() const noexcept { return maps_.begin(); }
  auto end() const noexcept { return maps_.end(); }

  /// Return the map of an index of any type of whole number.
  template <class Index, std::enable_if_t<std::is_integral_v<Index>, int> = 0>
  const FeatureMap& operator[](Index index) const {
    const bool is_negative = index < Index{0};
    if (!is_negative && static_cast<std::uintmax_t>(index) < maps_.size()) return maps_[static_cast<std::size_t>(index)];
    throw Error(Code::input, "there is no map " + std::to_string(index) + ": this backbone returns " + names());
  }
  const FeatureMap& operator[](const std::string& name) const {
    for (const FeatureMap& one : maps_) {
      if (one.name == name) return one;
    }
    throw Error(Code::input, "there is no map " + quoted(name) + ": this backbone returns " + names());
  }
  const FeatureMap& operator[](const char* name) const { return (*this)[std::string(name)]; }

 private:
  std::string names() const {
    std::vector<std::string> found;
    for (const FeatureMap& one : maps_) found.push_back(one.name);
    return text_of(found);
  }

  std::vector<FeatureMap> maps_;
};

}  // namespace edge_backbones
