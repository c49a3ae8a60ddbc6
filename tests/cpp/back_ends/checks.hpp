// What the C++ test programs of this folder share: checks that say what they found, and named cases.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <map>
#include <sstream>
#include <string>

#include <edge_backbones/errors.hpp>

namespace checks {

template <class Left, class Right>
void equal(const Left& found, const Right& expected, const char* what, int line) {
  if (found == expected) return;
  std::cerr << "line " << line << ": " << what << " is " << found << ", expected " << expected << "\n";
  std::exit(1);
}

inline void holds(bool is_true, const char* what, int line) {
  if (is_true) return;
  std::cerr << "line " << line << ": not so: " << what << "\n";
  std::exit(1);
}

/// Call a function that has to throw an Error; return "Name: message".
inline std::string refusal(const std::function<void()>& call, int line) {
  try {
    call();
  } catch (const edge_backbones::Error& error) {
    return std::string(edge_backbones::name_of(error.code())) + ": " + error.what();
  }
  std::cerr << "line " << line << ": nothing was thrown\n";
  std::exit(1);
}

/// Run the case that the first argument names.
inline int run(const std::map<std::string, std::function<void()>>& cases, int count, char** arguments) {
  const auto found = count > 1 ? cases.find(arguments[1]) : cases.end();
  if (found == cases.end()) {
    for (const auto& one : cases) std::cout << one.first << "\n";
    return 2;
  }
  found->second();
  return 0;
}

}  // namespace checks

#define EQUAL(found, expected) checks::equal(found, expected, #found, __LINE__)
#define HOLDS(condition) checks::holds(condition, #condition, __LINE__)
#define REFUSAL(...) checks::refusal([&] { __VA_ARGS__; }, __LINE__)
