/* Read and run a bundle from C, or from any language that calls C functions.
 *
 * The functions are in the library edge_backbones_c, which your project builds: CMake's target edge_backbones::c.
 *
 * Every function that can fail returns 0, or a code of eb_code, and then eb_last_error() says why. No exception leaves the
 * library. A null pointer, a closed handle, a buffer that is too short or a shape that does not fit is EB_INPUT, and nothing
 * was done. Threads may call eb_run and the functions that ask about a handle at once; eb_close must be the last call with it.
 *
 * Text is UTF-8 and ends with a null byte. Numbers of functions and structs grow only at their ends: a program that was
 * compiled with this header works with every later library of the same eb_abi_version().
 */
#ifndef EDGE_BACKBONES_H
#define EDGE_BACKBONES_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#if defined(EDGE_BACKBONES_C_BUILD)
#define EB_API __declspec(dllexport)
#else
#define EB_API __declspec(dllimport)
#endif
#else
#define EB_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised when a program that was compiled with an older header would not work any more. */
#define EB_ABI_VERSION 1

/* Most axes of an input or an output. */
#define EB_MAX_AXES 8

/* What went wrong. The names are those of Python's errors. */
enum eb_code {
  EB_OK = 0,
  EB_BUNDLE = 1,             /* the folder is not a bundle */
  EB_MANIFEST = 2,           /* manifest.json does not follow the bundle format */
  EB_INTEGRITY = 3,          /* a file is missing, truncated, changed or outside the folder */
  EB_ENGINE_MISMATCH = 4,    /* no engine of the bundle can run on this machine */
  EB_INPUT = 5,              /* an argument cannot be used */
  EB_INFERENCE = 6,          /* a loaded engine failed while it ran */
  EB_MISSING_DEPENDENCY = 7, /* the library was built without what an engine needs */
  EB_MEMORY = 8,             /* the process has no memory left */
  EB_INTERNAL = 9            /* a fault of this library: please report it */
};

enum eb_dtype { EB_FLOAT32 = 0, EB_FLOAT16 = 1, EB_UINT8 = 2 };

/* An open bundle and its loaded engine. Zero is no handle. A closed handle is never given out again. */
typedef uint64_t eb_backbone;

/* How a bundle is opened. Fill it with eb_default_options, then change what you need. */
typedef struct eb_options {
  size_t size;               /* of this struct; eb_default_options sets it */
  const char *engine;        /* a precision, a library or an engine's name; NULL for the best that runs here */
  const char *device;        /* "auto", "cpu", "cuda" or "cuda:1"; NULL for "auto" */
  const char *const *stages; /* names of the stages to return; NULL for those of the bundle */
  size_t stage_count;
  int32_t threads;           /* most CPU threads of a call; 0 for the library's choice */
  int32_t allow_host_code;   /* 1 allows engines that are programs (TorchScript), and runtimes inside plans */
} eb_options;

/* An input or an output. */
typedef struct eb_tensor_info {
  char name[304];               /* ends with a null byte */
  char layout[8];               /* order of the axes: NCHW, NHWC, NLC or NC */
  int32_t dtype;                /* eb_dtype */
  int32_t axes;                 /* how many sizes and strides follow */
  int64_t shape[EB_MAX_AXES];   /* see the function that fills it */
  int64_t strides[EB_MAX_AXES]; /* in elements, of the memory that a call writes or reads */
  size_t bytes;                 /* of that memory */
} eb_tensor_info;

/* What the input may be. Sizes are in pixels of the network; a frame's own size is in the shape of eb_input. */
typedef struct eb_input_info {
  eb_tensor_info opt; /* the shape that the engine is optimised for */
  int64_t batch[3];   /* min, opt, max of one engine call; eb_run takes any batch from 1 */
  int64_t height[3];  /* min, opt, max */
  int64_t width[3];
  int64_t multiple;   /* a height or width that is not fixed is a multiple of it */
} eb_input_info;

/* The ABI of the library: EB_ABI_VERSION of the header that it was built with. */
EB_API int32_t eb_abi_version(void);

/* The version of edge-backbones, such as "1.2.0". */
EB_API const char *eb_version(void);

/* Why the last call of this thread failed: one line, valid until the thread's next call. "" after a call that did not fail. */
EB_API const char *eb_last_error(void);

/* Python's name of a code: "InputError". */
EB_API const char *eb_code_name(int32_t code);

/* Write the defaults. */
EB_API int32_t eb_default_options(eb_options *options);

/* Open a bundle, choose an engine, check and load it. `options`: NULL for the defaults. */
EB_API int32_t eb_open(const char *path, const eb_options *options, eb_backbone *backbone);

/* Release the engine. Waits for work that was enqueued on a GPU. */
EB_API int32_t eb_close(eb_backbone backbone);

/* The name of the engine that runs, valid until eb_close. */
EB_API int32_t eb_engine(eb_backbone backbone, const char **name);

/* How many stages a call returns. */
EB_API int32_t eb_stage_count(eb_backbone backbone, size_t *count);

/* Name, channels and strides (vertical, horizontal input pixels per cell) of a stage. Every pointer may be NULL.
 * The name is valid until eb_close. */
EB_API int32_t eb_stage(eb_backbone backbone, size_t stage, const char **name, int64_t *channels, int64_t strides[2]);

/* What the engine takes. */
EB_API int32_t eb_input(eb_backbone backbone, eb_input_info *info);

/* The feature map of a stage for an input of this shape: its shape, and the strides and bytes of the memory that a call writes.
 * Maps in channels-last memory have shape NCHW and strides that say so. */
EB_API int32_t eb_map(eb_backbone backbone, size_t stage, const int64_t *input_shape, size_t axes, eb_tensor_info *info);

/* Run a batch from and to memory of the caller, and wait.
 *
 * `input` is row-major, of the dtype of eb_input, and has `input_bytes`. `maps[i]` has room for the bytes that eb_map says of
 * stage i, and `map_bytes[i]` says how many there are; a NULL leaves a stage out. The memory must not overlap. */
EB_API int32_t eb_run(eb_backbone backbone, const void *input, size_t input_bytes, const int64_t *input_shape, size_t axes,
                      void *const *maps, const size_t *map_bytes, size_t map_count);

/* Enqueue one engine call on a CUDA stream (a cudaStream_t), from and to memory of that GPU, without waiting.
 *
 * As eb_run, but: all pointers are of the GPU, at multiples of 256 bytes; the batch is one that the engine takes; every map is
 * there, and stages of the bundle that were not asked for cannot be left out by the engine, so open all of them. Memory must
 * stay as it is until the stream is past the call. */
EB_API int32_t eb_run_on_device(eb_backbone backbone, const void *input, size_t input_bytes, const int64_t *input_shape,
                                size_t axes, void *const *maps, const size_t *map_bytes, size_t map_count, void *stream);

#ifdef __cplusplus
}
#endif

#endif
