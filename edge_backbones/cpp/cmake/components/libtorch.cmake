# edge_backbones::libtorch: runs the TorchScript graph of a bundle on the CPU. C++20.
#
# libtorch comes from CMAKE_PREFIX_PATH or Torch_DIR, else from the Python wheel beside this package. Not with find_package(Torch):
# that of a wheel with CUDA asks for the CUDA toolkit.
set(_edge_backbones_folders "")
foreach(_edge_backbones_folder IN LISTS _edge_backbones_sites)
  list(APPEND _edge_backbones_folders "${_edge_backbones_folder}/torch")
endforeach()
set(_edge_backbones_hints ${Torch_ROOT} $ENV{Torch_ROOT})
foreach(_edge_backbones_folder IN ITEMS "${Torch_DIR}" "${TORCH_DIR}")
  if(_edge_backbones_folder)  # FOLDER/share/cmake/Torch, or FOLDER
    list(APPEND _edge_backbones_hints "${_edge_backbones_folder}/../../.." "${_edge_backbones_folder}")
  endif()
endforeach()
find_path(LIBTORCH_INCLUDE_DIR torch/script.h HINTS ${_edge_backbones_hints} PATHS ${_edge_backbones_folders} PATH_SUFFIXES include)
set(edge_backbones_libtorch_REASON "libtorch is missing: pip install torch into the environment of edge-backbones, or set \
Torch_DIR to the folder of TorchConfig.cmake")
if(LIBTORCH_INCLUDE_DIR)
  foreach(_edge_backbones_library IN ITEMS torch torch_cpu c10)
    find_library(LIBTORCH_${_edge_backbones_library} ${_edge_backbones_library} HINTS "${LIBTORCH_INCLUDE_DIR}/../lib" NO_DEFAULT_PATH)
  endforeach()
  if(LIBTORCH_torch AND LIBTORCH_torch_cpu AND LIBTORCH_c10)
    set(edge_backbones_libtorch_FOUND TRUE)
    if(NOT TARGET edge_backbones::libtorch)
      add_library(edge_backbones::libtorch INTERFACE IMPORTED)
      target_compile_features(edge_backbones::libtorch INTERFACE cxx_std_20)
      target_include_directories(edge_backbones::libtorch SYSTEM INTERFACE "${LIBTORCH_INCLUDE_DIR}"
        "${LIBTORCH_INCLUDE_DIR}/torch/csrc/api/include")
      target_link_libraries(edge_backbones::libtorch INTERFACE edge_backbones::edge_backbones "${LIBTORCH_torch}"
        "${LIBTORCH_torch_cpu}" "${LIBTORCH_c10}")
      target_compile_definitions(edge_backbones::libtorch INTERFACE EDGE_BACKBONES_WITH_LIBTORCH)
    endif()
  else()
    set(edge_backbones_libtorch_REASON "${LIBTORCH_INCLUDE_DIR} has the headers of libtorch, and ../lib beside it lacks its \
libraries: install torch again")
  endif()
endif()
