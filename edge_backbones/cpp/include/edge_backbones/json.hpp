// Strict JSON over nlohmann::json: bounded depth, no key twice, whole numbers of any size, and fields with paths for messages.
#pragma once

#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "text.hpp"

namespace edge_backbones::detail {

/// Why a document is refused; whoever called the reader makes an Error of it.
struct Refusal {
  std::string why;
};

using Json = nlohmann::json;
constexpr std::size_t most_depth = 900;
constexpr std::size_t most_digits = 4300;  // of a whole number, as in Python

/// Return the largest double as a whole number: 309 digits.
inline std::string most_double() { return "17976931348623157" + std::string(292, '0'); }

/// Replace whole numbers that no double holds by the largest double: nlohmann refuses them, and a few fields may have them.
inline std::string with_shorter_numbers(const char* data, std::size_t size) {
  std::string text;
  text.reserve(size);
  bool in_string = false;
  for (std::size_t at = 0; at < size;) {
    const char sign = data[at];
    if (in_string && sign == '\\' && at + 1 < size) {
      text.append(data + at, 2);
      at += 2;
      continue;
    }
    if (sign == '"') in_string = !in_string;
    if (in_string || sign < '0' || sign > '9') {
      text += sign;
      ++at;
      continue;
    }
    std::size_t end = at;
    while (end < size && data[end] >= '0' && data[end] <= '9') ++end;
    const char before = at == 0 ? ' ' : data[at - 1], after = end == size ? ' ' : data[end];
    const bool is_whole = std::strchr(".eE", after) == nullptr && std::strchr(".eE+", before) == nullptr;
    const std::size_t digits = end - at;
    if (is_whole && digits > most_digits) throw Refusal{"Integer value out of range"};
    const bool is_large = digits > 309 || (digits == 309 && std::string(data + at, digits) >= most_double());
    text += is_whole && is_large ? most_double() : std::string(data + at, digits);
    at = end;
  }
  return text;
}

/// Builds a document from the events of nlohmann's parser, and refuses what a strict reader must.
///
/// A whole number beyond 64 bits becomes a `binary` value, which JSON text cannot make otherwise, with its double inside.
class StrictBuilder {
 public:
  using number_integer_t = Json::number_integer_t;
  using number_unsigned_t = Json::number_unsigned_t;
  using number_float_t = Json::number_float_t;
  using string_t = Json::string_t;
  using binary_t = Json::binary_t;

  bool null() { return add(Json(nullptr)); }
  bool boolean(bool value) { return add(Json(value)); }
  bool number_integer(number_integer_t value) { return add(Json(value)); }
  bool number_unsigned(number_unsigned_t value) { return add(Json(value)); }
  bool number_float(number_float_t value, const string_t& text) {
    if (text.find_first_of(".eE") != string_t::npos) return add(Json(value));
    std::vector<std::uint8_t> bytes(sizeof value);
    std::memcpy(bytes.data(), &value, sizeof value);
    return add(Json::binary(std::move(bytes)));
  }
  bool string(string_t& value) { return add(Json(std::move(value))); }
  bool binary(binary_t&) { return false; }
  bool start_object(std::size_t) { return open(Json::object()); }
  bool key(string_t& name) {
    if (open_.back()->contains(name)) throw Refusal{"a key comes twice in one object"};
    key_ = std::move(name);
    return true;
  }
  bool end_object() { return close(); }
  bool start_array(std::size_t) { return open(Json::array()); }
  bool end_array() { return close(); }
  bool parse_error(std::size_t position, const std::string&, const Json::exception&) {
    throw Refusal{"JSON is malformed (byte " + std::to_string(position) + ")"};
  }

  Json take() { return std::move(root_); }

 private:
  Json* place(Json&& value) {
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    Json& parent = *open_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    return &(parent[key_] = std::move(value));
  }
  bool add(Json&& value) {
    place(std::move(value));
    return true;
  }
  bool open(Json&& value) {
    if (open_.size() >= most_depth) throw Refusal{"it is nested more than " + std::to_string(most_depth) + " deep"};
    open_.push_back(place(std::move(value)));
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  Json root_;
  std::vector<Json*> open_;
  std::string key_;
};

/// Parse a document. Throws Refusal.
inline Json parse_strictly(const char* data, std::size_t size) {
  if (size >= 3 && std::memcmp(data, "\xef\xbb\xbf", 3) == 0) throw Refusal{"JSON is malformed: it begins with a mark (byte 0)"};
  const std::string text = with_shorter_numbers(data, size);
  StrictBuilder builder;
  Json::sax_parse(text, &builder);
  return builder.take();
}

/// A value in the document, and where it is: "$.input.height".
class Node {
 public:
  Node(const Json& value, const Node* parent, std::string step) : value_(&value), parent_(parent), step_(std::move(step)) {}

  const Json& value() const { return *value_; }
  std::string path() const { return parent_ == nullptr ? step_ : parent_->path() + step_; }

  [[noreturn]] void refuse(const std::string& why) const { throw Refusal{why + " - at `" + path() + "`"}; }
  [[noreturn]] void expected(const char* what) const { refuse(std::string("Expected `") + what + "`, got `" + kind() + "`"); }

  bool is_null() const { return value_->is_null(); }

  bool boolean() const {
    if (!value_->is_boolean()) expected("bool");
    return value_->get<bool>();
  }

  /// Return a whole number in bounds.
  std::int64_t whole(std::int64_t least, std::int64_t most) const {
    if (!value_->is_number_integer() && !value_->is_binary()) expected("int");
    const bool fits = value_->is_number_integer() &&
                      (!value_->is_number_unsigned() || value_->get<std::uint64_t>() <= std::uint64_t{INT64_MAX});
    const std::int64_t found = fits ? value_->get<std::int64_t>() : 0;
    if (!fits || found < least || found > most) {
      refuse("Expected `int` from " + std::to_string(least) + " to " + std::to_string(most));
    }
    return found;
  }

  /// Check that the value is a whole number of any size.
  void any_whole() const {
    if (!value_->is_number_integer() && !value_->is_binary()) expected("int");
  }

  /// Return a finite number; whole ones are taken too.
  double number() const {
    if (value_->is_binary()) {
      double found = 0;
      std::memcpy(&found, value_->get_binary().data(), sizeof found);
      if (std::fabs(found) >= std::numeric_limits<double>::max()) refuse("Number out of range");
      return found;
    }
    if (!value_->is_number()) expected("float");
    return value_->get<double>();
  }
  double number(double least, double most, bool least_is_out = false) const {
    const double found = number();
    if (found < least || found > most || (least_is_out && found == least)) {
      refuse("Expected `float` from " + general(least) + " to " + general(most));
    }
    return found;
  }

  std::string text(std::size_t least = 0, std::size_t most = SIZE_MAX) const {
    if (!value_->is_string()) expected("str");
    auto found = value_->get<std::string>();
    const std::size_t length = least == 0 && most == SIZE_MAX ? 0 : length_of(found);
    if (length < least || length > most) {
      refuse("Expected `str` of length " + std::to_string(least) + " to " + std::to_string(most));
    }
    return found;
  }

  /// Return a text that is one of a few.
  std::string one_of(std::initializer_list<const char*> choices) const {
    auto found = text();
    for (const char* choice : choices) {
      if (found == choice) return found;
    }
    refuse("Invalid enum value " + quoted(shortened(found, 60)));
  }

  /// Return what `read` makes of every entry of an array of bounded length.
  template <class Read>
  auto list(Read read, std::size_t least = 0, std::size_t most = SIZE_MAX) const {
    if (!value_->is_array()) expected("array");
    if (value_->size() < least || value_->size() > most) refuse("Expected `array` of another length");
    std::vector<decltype(read(*this))> found;
    found.reserve(value_->size());
    for (std::size_t i = 0; i < value_->size(); ++i) {
      found.push_back(read(Node((*value_)[i], this, "[" + std::to_string(i) + "]")));
    }
    return found;
  }

  /// Check every value of an object whose keys may be any.
  template <class Check>
  void map(Check check) const {
    if (!value_->is_object()) expected("object");
    for (const auto& [name, value] : value_->items()) check(Node(value, this, "[...]"));
  }

 private:
  const char* kind() const {
    return value_->is_null() ? "null" : value_->is_boolean() ? "bool" : value_->is_string() ? "str" : value_->is_array() ? "array"
         : value_->is_object() ? "object" : value_->is_number_float() ? "float" : "int";
  }

  const Json* value_;
  const Node* parent_;
  std::string step_;
};

/// The fields of one object. Every field of the format is asked for, and `finish` refuses those that were not.
class Fields {
 public:
  explicit Fields(const Node& node) : node_(node) {
    if (!node.value().is_object()) node.expected("object");
  }

  /// Return a field that must be there.
  Node at(const char* name) {
    auto found = find(name);
    if (!found) node_.refuse(std::string("Object missing required field `") + name + "`");
    return *found;
  }

  /// Return a field that may be left out.
  std::optional<Node> find(const char* name) {
    const auto found = node_.value().find(name);
    if (found == node_.value().end()) return std::nullopt;
    known_.insert(name);
    return Node(*found, &node_, std::string(".") + name);
  }

  /// Return a field that may be left out or null.
  std::optional<Node> given(const char* name) {
    auto found = find(name);
    return found && found->is_null() ? std::nullopt : found;
  }

  /// Refuse a field that the format does not know.
  void finish() const {
    if (known_.size() == node_.value().size()) return;
    for (const auto& [name, value] : node_.value().items()) {
      if (known_.count(name) == 0) node_.refuse("Object contains unknown field `" + shortened(name, 80) + "`");
    }
  }

 private:
  const Node& node_;
  std::set<std::string> known_;
};

}  // namespace edge_backbones::detail
