/* Copies and fills, which streams do in order. */
#include "standin.h"

#include <stdlib.h>
#include <string.h>

typedef struct Plane {
    uintptr_t address;
    size_t pitch;
    bool must_be_known; /* the caller says that it is memory of a device */
} Plane;

static size_t span(size_t pitch, size_t width, size_t height) { return height ? (height - 1) * pitch + width : 0; }

/* Fills in an operation; says whether one side is memory of the host that is not page-locked. */
static CUresult plan_copy(Op *op, Plane to, Plane from, size_t width, size_t height) {
    if (to.must_be_known)
        CHECK(range_known(to.address, span(to.pitch, width, height), "copy to the device"));
    if (from.must_be_known)
        CHECK(range_known(from.address, span(from.pitch, width, height), "copy from the device"));
    *op = (Op){.work = COPY};
    op->copy.to = to.address;
    op->copy.from = from.address;
    op->copy.width = width;
    op->copy.height = height;
    op->copy.to_pitch = to.pitch;
    op->copy.from_pitch = from.pitch;
    op->copy.to_known = block_at(to.address) != NULL;
    op->copy.from_known = block_at(from.address) != NULL;
    if (op->copy.to_known && !to.must_be_known)
        CHECK(range_known(to.address, span(to.pitch, width, height), "copy to page-locked memory"));
    if (op->copy.from_known && !from.must_be_known)
        CHECK(range_known(from.address, span(from.pitch, width, height), "copy from page-locked memory"));
    return SUCCESS;
}

/* Pageable memory: what is read is read at once, and what is written is there when the call returns. */
static CUresult copy_async(const void *handle, Plane to, Plane from, size_t width, size_t height) {
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    if (!width || !height)
        return SUCCESS;
    Op op;
    CHECK(plan_copy(&op, to, from, width, height));
    if (stream->capture)
        return enqueue(stream, &op);
    if (!op.copy.from_known) {
        size_t size = span(from.pitch, width, height);
        op.copy.staged = malloc(size);
        if (!op.copy.staged)
            return OUT_OF_MEMORY;
        memcpy(op.copy.staged, (const void *)from.address, size);
    }
    CHECK(enqueue(stream, &op));
    if (!op.copy.to_known)
        drain(stream);
    return stream->context->lost;
}

static CUresult copy_now(Plane to, Plane from, size_t width, size_t height) {
    CHECK(safe_during_capture());
    CHECK(copy_async(NULL, to, from, width, height));
    bool on_device = to.must_be_known && from.must_be_known; /* the host does not wait for such a copy */
    Stream *stream;
    CHECK(stream_of(NULL, &stream));
    if (!on_device)
        drain(stream);
    return stream->context->lost;
}

static Plane device(CUdeviceptr address) { return (Plane){(uintptr_t)address, 0, true}; }
static Plane host(const void *address) { return (Plane){(uintptr_t)address, 0, false}; }
static Plane either(CUdeviceptr address) { return (Plane){(uintptr_t)address, 0, false}; }

API CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t size) {
    ENTER_IN_CONTEXT("cuMemcpy");
    return copy_now(either(to), either(from), size, 1);
}

API CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, const void *stream) {
    ENTER_IN_CONTEXT("cuMemcpyAsync");
    return copy_async(stream, either(to), either(from), size, 1);
}

API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t size) {
    ENTER_IN_CONTEXT("cuMemcpyHtoD");
    return copy_now(device(to), host(from), size, 1);
}

API CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t size) {
    ENTER_IN_CONTEXT("cuMemcpyDtoH");
    return copy_now(host(to), device(from), size, 1);
}

API CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t size) {
    ENTER_IN_CONTEXT("cuMemcpyDtoD");
    return copy_now(device(to), device(from), size, 1);
}

API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, const void *stream) {
    ENTER_IN_CONTEXT("cuMemcpyHtoDAsync");
    return copy_async(stream, device(to), host(from), size, 1);
}

API CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, const void *stream) {
    ENTER_IN_CONTEXT("cuMemcpyDtoHAsync");
    return copy_async(stream, host(to), device(from), size, 1);
}

API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t size, const void *stream) {
    ENTER_IN_CONTEXT("cuMemcpyDtoDAsync");
    return copy_async(stream, device(to), device(from), size, 1);
}

enum { HOST_SIDE = 1, DEVICE_SIDE = 2, UNIFIED_SIDE = 4 };

typedef struct Copy2D {
    size_t from_x, from_y;
    int from_type;
    const void *from_host;
    CUdeviceptr from_device;
    void *from_array;
    size_t from_pitch;
    size_t to_x, to_y;
    int to_type;
    void *to_host;
    CUdeviceptr to_device;
    void *to_array;
    size_t to_pitch;
    size_t width, height;
} Copy2D;

static CUresult plane_of(Plane *plane, int type, const void *memory, CUdeviceptr pointer, size_t pitch, size_t x,
                         size_t y, size_t width) {
    if (type != HOST_SIDE && type != DEVICE_SIDE && type != UNIFIED_SIDE)
        return NOT_SUPPORTED; /* arrays of textures */
    if (!pitch)
        pitch = x + width;
    if (pitch < x + width)
        return INVALID_VALUE;
    uintptr_t start = type == HOST_SIDE ? (uintptr_t)memory : (uintptr_t)pointer;
    *plane = (Plane){start + y * pitch + x, pitch, type == DEVICE_SIDE};
    return SUCCESS;
}

static CUresult planes_of(const Copy2D *copy, Plane *to, Plane *from) {
    CHECK(plane_of(from, copy->from_type, copy->from_host, copy->from_device, copy->from_pitch, copy->from_x,
                   copy->from_y, copy->width));
    return plane_of(to, copy->to_type, copy->to_host, copy->to_device, copy->to_pitch, copy->to_x, copy->to_y,
                    copy->width);
}

API CUresult cuMemcpy2D_v2(const Copy2D *copy) {
    ENTER_IN_CONTEXT("cuMemcpy2D");
    Plane to, from;
    CHECK(planes_of(copy, &to, &from));
    return copy_now(to, from, copy->width, copy->height);
}

API CUresult cuMemcpy2DUnaligned_v2(const Copy2D *copy) { return cuMemcpy2D_v2(copy); }

API CUresult cuMemcpy2DAsync_v2(const Copy2D *copy, const void *stream) {
    ENTER_IN_CONTEXT("cuMemcpy2DAsync");
    Plane to, from;
    CHECK(planes_of(copy, &to, &from));
    return copy_async(stream, to, from, copy->width, copy->height);
}

static CUresult set(const void *handle, CUdeviceptr to, size_t pitch, unsigned value, size_t element, size_t width,
                    size_t height) {
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    if (!width || !height)
        return SUCCESS;
    if (to % element)
        return INVALID_VALUE;
    CHECK(range_known((uintptr_t)to, span(pitch, width * element, height), "memset"));
    Op op = {.work = SET};
    op.set.to = (uintptr_t)to;
    op.set.pitch = pitch;
    op.set.value = value;
    op.set.element = element;
    op.set.width = width;
    op.set.height = height;
    return enqueue(stream, &op);
}

#define FILL(bits, type)                                                                                       \
    API CUresult cuMemsetD##bits##_v2(CUdeviceptr to, type value, size_t count) {                              \
        ENTER_IN_CONTEXT("cuMemsetD" #bits);                                                                   \
        return set(NULL, to, 0, value, sizeof(type), count, 1);                                                \
    }                                                                                                          \
    API CUresult cuMemsetD##bits##Async(CUdeviceptr to, type value, size_t count, const void *stream) {        \
        ENTER_IN_CONTEXT("cuMemsetD" #bits "Async");                                                           \
        return set(stream, to, 0, value, sizeof(type), count, 1);                                              \
    }                                                                                                          \
    API CUresult cuMemsetD2D##bits##_v2(CUdeviceptr to, size_t pitch, type value, size_t width, size_t height) { \
        ENTER_IN_CONTEXT("cuMemsetD2D" #bits);                                                                 \
        return set(NULL, to, pitch, value, sizeof(type), width, height);                                       \
    }                                                                                                          \
    API CUresult cuMemsetD2D##bits##Async(CUdeviceptr to, size_t pitch, type value, size_t width, size_t height, \
                                          const void *stream) {                                                \
        ENTER_IN_CONTEXT("cuMemsetD2D" #bits "Async");                                                         \
        return set(stream, to, pitch, value, sizeof(type), width, height);                                     \
    }

FILL(8, unsigned char)
FILL(16, unsigned short)
FILL(32, unsigned)
