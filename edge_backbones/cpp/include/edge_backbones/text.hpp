// Words for messages: numbers as Python writes them, and text from a stranger's bundle made safe to print.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "unicode.hpp"

namespace edge_backbones {

namespace detail {

/// Return the code point at `position` of a text in UTF-8 and move on; bytes that are not UTF-8 become U+DC80 + (byte & 127).
inline std::uint32_t next_character(const std::string& text, std::size_t& position) noexcept {
  const auto byte = [&](std::size_t at) { return static_cast<unsigned char>(text[at]); };
  const unsigned lead = byte(position);
  const std::size_t length = lead < 0x80 ? 1 : lead >= 0xc2 && lead < 0xe0 ? 2 : (lead & 0xf0u) == 0xe0 ? 3
                           : lead >= 0xf0 && lead < 0xf5 ? 4 : 0;
  bool whole = length != 0 && position + length <= text.size();
  std::uint32_t point = length <= 1 ? lead : lead & (0x7fu >> length);
  for (std::size_t i = 1; whole && i < length; ++i) {
    const unsigned more = byte(position + i);
    whole = (more & 0xc0u) == 0x80u;
    point = (point << 6) | (more & 0x3fu);
  }
  whole = whole && !(length == 3 && (point < 0x800 || (point >= 0xd800 && point < 0xe000))) &&
          !(length == 4 && (point < 0x10000 || point > 0x10ffff));
  if (!whole) {
    ++position;
    return 0xdc00u + lead;
  }
  position += length;
  return point;
}

inline bool is_in(const std::uint32_t (*ranges)[2], std::size_t count, std::uint32_t point) noexcept {
  std::size_t low = 0, high = count;
  while (low < high) {
    const std::size_t middle = (low + high) / 2;
    if (ranges[middle][1] < point) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < count && ranges[low][0] <= point;
}

/// Append a character as Python's unicode_escape writes it: \n, \x1b, \u202e, \U000e0001.
inline void append_escape(std::string& text, std::uint32_t point) {
  char buffer[16];
  if (point == '\n' || point == '\r' || point == '\t') {
    text += point == '\n' ? "\\n" : point == '\r' ? "\\r" : "\\t";
    return;
  }
  std::snprintf(buffer, sizeof buffer, point < 0x100 ? "\\x%02x" : point < 0x10000 ? "\\u%04x" : "\\U%08x", point);
  text += buffer;
}

}  // namespace detail

/// Return how many characters (code points) a text in UTF-8 has.
inline std::size_t length_of(const std::string& text) noexcept {
  std::size_t count = 0;
  for (std::size_t at = 0; at < text.size(); ++count) detail::next_character(text, at);
  return count;
}

/// Return whether every character can be printed, as Python's str.isprintable.
inline bool is_printable(const std::string& text) noexcept {
  for (std::size_t at = 0; at < text.size();) {
    if (detail::is_in(detail::not_printable, detail::not_printable_count, detail::next_character(text, at))) return false;
  }
  return true;
}

/// Return a text as one line that is safe to print: control, invisible and direction characters become escapes.
inline std::string visible(const std::string& text) {
  std::string found;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t begin = at;
    const std::uint32_t point = detail::next_character(text, at);
    if (detail::is_in(detail::unseen, detail::unseen_count, point)) {
      detail::append_escape(found, point);
    } else {
      found.append(text, begin, at - begin);
    }
  }
  return found;
}

/// Return a text with its middle cut out if it has more than `longest` characters.
inline std::string shortened(const std::string& text, std::size_t longest) {
  std::vector<std::size_t> starts;
  for (std::size_t at = 0; at < text.size(); detail::next_character(text, at)) starts.push_back(at);
  if (starts.size() <= longest) return text;
  const std::size_t end = longest / 3;
  return text.substr(0, starts[longest - end - 5]) + " ... " + text.substr(starts[starts.size() - end]);
}

/// Return a text in quotes, as Python's repr writes it.
inline std::string quoted(const std::string& text) {
  const bool twice = text.find('\'') != std::string::npos && text.find('"') == std::string::npos;
  std::string found(1, twice ? '"' : '\'');
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t begin = at;
    const std::uint32_t point = detail::next_character(text, at);
    if (point == '\\' || (point == '\'' && !twice)) {
      found += '\\';
      found += static_cast<char>(point);
    } else if (detail::is_in(detail::not_printable, detail::not_printable_count, point)) {
      detail::append_escape(found, point);
    } else {
      found.append(text, begin, at - begin);
    }
  }
  return found += found[0];
}

/// Return sizes as Python writes a tuple: (1, 3, 224, 224), (7,).
inline std::string text_of(const std::vector<std::int64_t>& sizes) {
  std::string found = "(";
  for (std::size_t i = 0; i < sizes.size(); ++i) found += (i ? ", " : "") + std::to_string(sizes[i]);
  return found + (sizes.size() == 1 ? ",)" : ")");
}

/// Return texts as Python writes a list of them: ['layer1', 'layer2'].
inline std::string text_of(const std::vector<std::string>& texts) {
  std::string found = "[";
  for (std::size_t i = 0; i < texts.size(); ++i) found += (i ? ", " : "") + quoted(texts[i]);
  return found + "]";
}

/// Return texts with `between` between them.
inline std::string joined(const std::vector<std::string>& texts, const std::string& between = ", ") {
  std::string found;
  for (std::size_t i = 0; i < texts.size(); ++i) found += (i ? between : "") + texts[i];
  return found;
}

namespace detail {

/// Return a number by a format of printf, with a point as in every language.
inline std::string formatted(const char* format, double value) {
  char buffer[400];
  std::snprintf(buffer, sizeof buffer, format, value);
  for (char* at = buffer; *at; ++at) {
    if (*at == ',') *at = '.';  // the locale's decimal comma
  }
  return buffer;
}

}  // namespace detail

/// Return a number as Python's format "g" writes it.
inline std::string general(double value) { return detail::formatted("%g", value); }

}  // namespace edge_backbones
