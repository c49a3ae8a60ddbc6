// Opens an engine with the library that the program is linked to; prints the library's release, and why it does not run here.
#include <edge_backbones/tensorrt.hpp>
#include <iostream>

int main() {
  namespace eb = edge_backbones;
  const eb::BackEnd library = eb::tensorrt_rtx_back_end();
  std::cout << library.flavour << " " << library.version() << "\n";
  try {
    library.load(eb::Manifest{}, eb::EngineRecord{}, {}, eb::LoadOptions{});
  } catch (const eb::Error& error) {
    std::cout << eb::name_of(error.code()) << ": " << error.what() << "\n";
    return 0;
  }
  return 1;
}
