# edge_backbones::c: the functions of edge_backbones.h as a shared library, edge_backbones_c, which your project builds.
#
# It runs engines with the libraries whose components your project asks for beside this one, in whatever order.
set(edge_backbones_C_FOUND TRUE)
if(NOT TARGET edge_backbones_c)
  file(STRINGS "${_edge_backbones_cpp}/../__init__.py" _edge_backbones_line REGEX "^__version__ = ")
  string(REGEX MATCH "[0-9][^\"]*" _edge_backbones_version "${_edge_backbones_line}")
  add_library(edge_backbones_c SHARED "${_edge_backbones_cpp}/src/c_api.cpp")
  add_library(edge_backbones::c ALIAS edge_backbones_c)
  set_target_properties(edge_backbones_c PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON SOVERSION 1)
  target_compile_definitions(edge_backbones_c PRIVATE EDGE_BACKBONES_C_BUILD
    EDGE_BACKBONES_VERSION="${_edge_backbones_version}")
  target_include_directories(edge_backbones_c INTERFACE "${edge_backbones_INCLUDE_DIR}")
  target_link_libraries(edge_backbones_c PRIVATE edge_backbones::edge_backbones)
  foreach(_edge_backbones_target IN ITEMS openvino tensorrt tensorrt_rtx libtorch)
    target_link_libraries(edge_backbones_c PRIVATE $<TARGET_NAME_IF_EXISTS:edge_backbones::${_edge_backbones_target}>)
  endforeach()
endif()
