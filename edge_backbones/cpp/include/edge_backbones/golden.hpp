// Read golden.npz: images and the fp32 reference of every engine output for them, by case.
//
// The file is a zip of plain arrays, stored and not compressed, exactly the ones that the manifest promises. Nothing is
// unpacked or unpickled. The same rules as edge_backbones/bundle/golden.py.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "files.hpp"
#include "manifest.hpp"
#include "types.hpp"

namespace edge_backbones {

/// An array that owns its memory, row-major.
struct Array {
  DType dtype = DType::float32;
  Shape shape;
  std::vector<char> bytes;

  ConstTensor tensor() const { return ConstTensor(bytes.data(), dtype, shape); }
};

/// Images of one size, and the fp32 reference of every output for them, one entry of the first axis per image.
struct GoldenCase {
  std::string name;
  Array images;
  std::map<std::string, Array> outputs;
};

namespace detail {

/// Why golden.npz is refused.
struct NotGolden {
  std::string why;
};

inline std::uint64_t little_endian(const char* data, std::size_t bytes) {
  std::uint64_t value = 0;
  for (std::size_t i = bytes; i-- > 0;) value = value << 8 | static_cast<unsigned char>(data[i]);
  return value;
}

using Members = std::map<std::string, std::pair<const char*, std::size_t>>;

/// Return where each wanted file of a zip file lies, by name without ".npy".
inline Members npz_members(const std::vector<char>& data, const std::set<std::string>& wanted) {
  Members found;
  std::size_t at = 0;
  const auto left = [&] { return data.size() - at; };
  const auto begins = [&](const char* sign) { return left() >= 4 && std::memcmp(data.data() + at, sign, 4) == 0; };
  while (begins("PK\3\4")) {
    if (left() < 30) throw NotGolden{"its last file is cut off"};
    const char* head = data.data() + at;
    const std::uint64_t flags = little_endian(head + 6, 2), method = little_endian(head + 8, 2);
    std::uint64_t packed = little_endian(head + 18, 4), size = little_endian(head + 22, 4);
    const std::size_t name_length = little_endian(head + 26, 2), extra_length = little_endian(head + 28, 2);
    at += 30;
    if (left() < name_length + extra_length) throw NotGolden{"its last file is cut off"};
    std::string name(data.data() + at, name_length);
    if (name.size() >= 4 && name.compare(name.size() - 4, 4, ".npy") == 0) name.resize(name.size() - 4);
    if (size == 0xFFFFFFFFu) {  // numpy writes the sizes into an extra field
      const char* extra = data.data() + at + name_length;
      if (left() - name_length < 20 || little_endian(extra, 2) != 1) throw NotGolden{shortened(name, 80) + " has no size"};
      size = little_endian(extra + 4, 8);
      packed = little_endian(extra + 12, 8);
    }
    at += name_length + extra_length;
    if (wanted.count(name) == 0 || found.count(name) != 0) {
      throw NotGolden{quoted(shortened(name, 80)) + " is in it twice, or is not promised"};
    }
    if (method != 0 || (flags & ~std::uint64_t{0x800}) != 0 || packed != size || size > left()) {
      throw NotGolden{shortened(name, 80) + " is compressed, encrypted or cut off"};
    }
    found[name] = {data.data() + at, static_cast<std::size_t>(size)};
    at += static_cast<std::size_t>(size);
  }
  if (!begins("PK\1\2")) throw NotGolden{"it is not an .npz: no file begins at byte " + std::to_string(at)};
  return found;
}

/// Return the sizes in the header of an .npy file: "2, 64, 32, 32" or "7,".
inline Shape npy_shape(const std::string& text, const std::string& name) {
  Shape shape;
  std::size_t at = 0;
  while (at <= text.size()) {
    std::size_t end = text.find(',', at);
    if (end == std::string::npos) end = text.size();
    std::size_t first = at, last = end;
    while (first < last && text[first] == ' ') ++first;
    while (last > first && text[last - 1] == ' ') --last;
    at = end + 1;
    if (first == last) continue;
    const std::string digits = text.substr(first, last - first);
    if (digits.find_first_not_of("0123456789") != std::string::npos || digits.size() > 12 || shape.size() == 8) {
      throw NotGolden{shortened(name, 80) + " has no shape of an array"};
    }
    shape.push_back(std::stoll(digits));
  }
  return shape;
}

/// Return the array in an .npy file of version 1.0, little-endian, row-major, with as many bytes as its shape needs.
inline Array npy_array(const std::pair<const char*, std::size_t>& member, const std::string& name, DType dtype) {
  const auto [data, size] = member;
  const NotGolden not_plain{shortened(name, 80) + " is not a plain array"};
  if (size < 10 || std::memcmp(data, "\x93NUMPY\1\0", 8) != 0) throw not_plain;
  const std::size_t length = little_endian(data + 8, 2);
  if (size - 10 < length) throw not_plain;
  const std::string header(data + 10, length), start = "{'descr': '", middle = "', 'fortran_order': False, 'shape': (";
  if (header.compare(0, start.size(), start) != 0 || header.size() < start.size() + 3) throw not_plain;
  const std::string kind = header.substr(start.size(), 3);
  if (header.compare(start.size() + 3, middle.size(), middle) != 0) throw not_plain;
  const std::size_t begin = start.size() + 3 + middle.size(), close = header.find(')', begin);
  if (close == std::string::npos) throw not_plain;
  const std::string sizes = header.substr(begin, close - begin);
  std::size_t rest = close;
  if (header.compare(rest, 4, "), }") != 0) throw not_plain;
  rest += 4;
  while (rest < header.size() && header[rest] == ' ') ++rest;
  if (rest + 1 != header.size() || header[rest] != '\n' || sizes.find_first_not_of("0123456789, ") != std::string::npos) {
    throw not_plain;
  }
  if (kind != "<f4" && kind != "<f2" && kind != "|u1") throw not_plain;
  const DType found = kind == "<f4" ? DType::float32 : kind == "<f2" ? DType::float16 : DType::uint8;
  if (found != dtype) {
    throw NotGolden{shortened(name, 80) + " is " + name_of(found) + ", and has to be " + name_of(dtype)};
  }
  Array array;
  array.dtype = found;
  array.shape = npy_shape(sizes, name);
  const std::size_t bytes = size - 10 - length;
  std::uint64_t count = 1;
  bool too_many = false;
  for (const std::int64_t axis : array.shape) {
    too_many = too_many || (axis > 0 && count > (std::uint64_t{1} << 60) / static_cast<std::uint64_t>(axis));
    count = too_many ? 0 : count * static_cast<std::uint64_t>(axis);
  }
  if (too_many || count * bytes_of(found) != bytes) {
    throw NotGolden{shortened(name, 80) + " has " + std::to_string(bytes) + " bytes, and its shape " + text_of(array.shape) +
                    " asks for others"};
  }
  array.bytes.assign(data + 10 + length, data + size);
  return array;
}

inline std::vector<GoldenCase> decode_golden(const std::vector<char>& data, const Manifest& manifest) {
  const InputSpec& input = manifest.input;
  const auto outputs = manifest.backbone.described_outputs();
  const auto key = [](const std::string& one, const std::string& name) { return one + "/" + name; };
  std::set<std::string> wanted;
  for (const std::string& one : manifest.golden.cases) {
    wanted.insert(key(one, input.name));
    for (const OutputSpec& output : outputs) wanted.insert(key(one, output.name));
  }
  const Members members = npz_members(data, wanted);
  for (const std::string& name : wanted) {
    if (members.count(name) == 0) throw NotGolden{"it lacks " + shortened(name, 120)};
  }
  std::vector<GoldenCase> found;
  for (const std::string& one : manifest.golden.cases) {
    GoldenCase golden;
    golden.name = one;
    golden.images = npy_array(members.at(key(one, input.name)), key(one, input.name), input.dtype());
    if (!input.takes(golden.images.shape)) {
      throw NotGolden{one + "/" + input.name + " of shape " + text_of(golden.images.shape) +
                      " does not fit: this engine takes " + input.describe()};
    }
    for (const OutputSpec& output : outputs) {
      const std::string name = key(one, output.name);
      Array values = npy_array(members.at(name), name, DType::float32);
      const Shape& shape = values.shape;
      const bool fits = shape.size() == output.layout.size() && shape[output.layout.find('C')] == output.channels;
      if (!fits || shape[0] != golden.images.shape[0] || values.bytes.empty()) {
        throw NotGolden{shortened(name, 80) + " has shape " + text_of(shape) + ", and the backbone returns " + output.layout +
                        " with " + std::to_string(output.channels) + " channels, and " +
                        std::to_string(golden.images.shape[0]) + " images"};
      }
      golden.outputs.emplace(output.name, std::move(values));
    }
    found.push_back(std::move(golden));
  }
  return found;
}

}  // namespace detail

/// Return the golden samples of a bundle. Throws Code::integrity if they are not what the manifest says.
inline std::vector<GoldenCase> load_golden(const Manifest& manifest) {
  const std::vector<char> data = read_checked(manifest.folder, manifest.golden.file);
  try {
    return detail::decode_golden(data, manifest);
  } catch (const detail::NotGolden& error) {
    throw Error(Code::integrity, detail::below(manifest.folder, manifest.golden.file.path) +
                                     " does not hold what the manifest says: " + error.why + "; build the bundle again");
  }
}

}  // namespace edge_backbones
