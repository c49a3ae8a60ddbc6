/* Read and run a bundle from C, or from any language that calls C functions.
 *
 * The functions are in the library edge_backbones_c, which your project builds: CMake's target edge_backbones::c.
 *
 * Every function that can fail returns 0, or a code of eb_code, and then eb_last_error() says why. No exception leaves the
 * library. A null pointer, a closed handle, a buffer that is too short or a shape that does not fit is EB_INPUT, and nothing
 * was done. Threads may use one handle at once.
 *
 * Text is UTF-8 and ends with a null byte. Structs begin with their size and grow only at their ends: a program that was
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

/* How a bundle is opened. Zeros are the defaults: eb_options options = {.size = sizeof options}; */
typedef struct eb_options {
  size_t size;               /* sizeof(eb_options) */
  const char *engine;        /* a precision, a library or an engine's name; NULL for the best that runs here */
  const char *device;        /* "auto", "cpu", "cuda" or "cuda:1"; NULL for "auto" */
  const char *const *stages; /* names of the stages to return, in stage order; NULL for those of the bundle */
  size_t stage_count;
  int32_t threads;            /* most CPU threads of a call; 0 for the library's choice */
  int32_t allow_host_code;    /* 1 allows engines that are programs (TorchScript), and runtimes inside plans */
  int32_t accept_not_finite;  /* 1 runs inputs with NaN and infinity; otherwise they are EB_INPUT */
  int32_t signature_checked;  /* 1 if somebody else has checked the signature, where the machine asks for one */
} eb_options;

/* What the engine takes. Set `size` before the call: eb_input_info info = {.size = sizeof info}; */
typedef struct eb_input_info {
  size_t size;             /* sizeof(eb_input_info) */
  const char *name;        /* pixel_values, image or frame */
  const char *description; /* a phrase for people: dtype, layout, sizes */
  const char *layout;      /* NCHW or NHWC */
  int32_t dtype;           /* an eb_dtype */
  int32_t axes;            /* 4 */
  int64_t opt_shape[EB_MAX_AXES]; /* the shape that the engine is optimised for */
  int64_t batch[3];        /* min, opt, max of one engine call; eb_run takes any batch from 1 */
  int64_t height[3];       /* min, opt, max, in pixels of the network; the size of a camera's frame is in opt_shape */
  int64_t width[3];
  int64_t multiple;        /* a height or width that is not fixed is a multiple of it */
} eb_input_info;

/* One output. Set `size` before the call: eb_output_info info = {.size = sizeof info}; */
typedef struct eb_output_info {
  size_t size;        /* sizeof(eb_output_info) */
  const char *name;   /* of the stage */
  const char *layout; /* order of the axes: NCHW, NHWC, NLC or NC */
  int32_t dtype;      /* an eb_dtype */
  int32_t axes;       /* how many sizes and strides follow */
  int64_t channels;
  int64_t stride[2];               /* vertical and horizontal input pixels per cell; zeros if it is no feature map */
  int64_t shape[EB_MAX_AXES];      /* for the input's shape that was asked about */
  int64_t strides[EB_MAX_AXES];    /* in elements, of the memory that a call writes. Maps in channels-last memory have the
                                      layout NCHW, and strides that say so */
  size_t bytes;                    /* of that memory */
} eb_output_info;

/* The ABI of the library: EB_ABI_VERSION of the header that it was built with. */
EB_API int32_t eb_abi_version(void);

/* The version of edge-backbones, such as "1.2.0". */
EB_API const char *eb_version(void);

/* Why the last call of this thread failed, in one line; "" if it did not fail. Valid until this thread's next call. */
EB_API const char *eb_last_error(void);

/* Python's name of a code: "InputError". */
EB_API const char *eb_code_name(int32_t code);

/* Open a bundle, choose an engine, check and load it. `options`: NULL for the defaults. */
EB_API int32_t eb_open(const char *path, const eb_options *options, eb_backbone *backbone);

/* Release the engine, and wait for work on a GPU. If calls run in other threads, they finish, and the last one does it. */
EB_API int32_t eb_close(eb_backbone backbone);

/* The name of the engine that runs, and its device: "cpu", "cuda:0". Either pointer may be NULL. Valid until eb_close. */
EB_API int32_t eb_engine(eb_backbone backbone, const char **name, const char **device);

/* What the engine takes. The texts are valid until eb_close. */
EB_API int32_t eb_input(eb_backbone backbone, eb_input_info *info);

/* How many outputs a call returns. The first `stages` are the feature maps, in stage order; class tokens and hidden states of
 * a bundle that has them follow. Either pointer may be NULL. */
EB_API int32_t eb_output_count(eb_backbone backbone, size_t *outputs, size_t *stages);

/* What a call writes to one output, for an input of this shape; NULL for the shape that the engine is optimised for. The texts
 * are valid until eb_close. The first question about a shape may run the engine once. */
EB_API int32_t eb_output(eb_backbone backbone, size_t output, const int64_t *input_shape, size_t axes, eb_output_info *info);

/* Run a batch from and to memory of the caller, and wait.
 *
 * `input` is row-major, of the dtype that eb_input names, and has `input_bytes`. `outputs[i]` has room for the bytes that
 * eb_output names, and `output_bytes[i]` says how many there are; a NULL leaves an output out. The memory is aligned for its
 * dtype and does not overlap. `output_count` is that of eb_output_count. */
EB_API int32_t eb_run(eb_backbone backbone, const void *input, size_t input_bytes, const int64_t *input_shape, size_t axes,
                      void *const *outputs, const size_t *output_bytes, size_t output_count);

/* Enqueue one engine call on a CUDA stream (a cudaStream_t), from and to memory of that GPU, and return without waiting.
 *
 * As eb_run, but: all pointers are of the GPU, at multiples of 256 bytes; the batch is one that the engine takes; the bundle is
 * open with all of its stages, and none is left out. The memory must stay as it is until the stream is past the call. */
EB_API int32_t eb_run_on_device(eb_backbone backbone, const void *input, size_t input_bytes, const int64_t *input_shape,
                                size_t axes, void *const *outputs, const size_t *output_bytes, size_t output_count,
                                void *stream);

#ifdef __cplusplus
}
#endif

#endif
