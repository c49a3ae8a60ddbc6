/* Start, devices, contexts, and the names of errors and functions. */
#define _GNU_SOURCE
#include "standin.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static Context primaries[MOST_DEVICES];
static pid_t started; /* the process that called cuInit */

void forget_losses(void) {
    for (int i = 0; i < MOST_DEVICES; i++)
        primaries[i].lost = SUCCESS;
}

/* ---- errors ---- */

static const struct {
    CUresult code;
    const char *name, *text;
} errors[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "part or all of the requested memory range is already mapped"},
    {HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "pointer does not correspond to a registered memory region"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {CAPTURE_MERGE, "CUDA_ERROR_STREAM_CAPTURE_MERGE",
     "operation would result in a merge of separate capture sequences"},
    {CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began"},
    {CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED",
     "capturing stream has unjoined work"},
    {CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
     "dependency created on uncaptured work in another stream"},
    {CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT",
     "operation not permitted on an event last recorded in a capturing stream"},
    {CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
     "attempt to terminate a thread-local capture sequence from another thread"},
};

static CUresult say_error(CUresult code, const char **text, bool name) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) {
            *text = name ? errors[i].name : errors[i].text;
            return SUCCESS;
        }
    *text = NULL;
    return INVALID_VALUE;
}

API CUresult cuGetErrorName(CUresult code, const char **name) { return say_error(code, name, true); }

API CUresult cuGetErrorString(CUresult code, const char **text) { return say_error(code, text, false); }

/* ---- functions by name ---- */

/* The forms of functions that have several: a caller gets the newest that its version and the driver's have. */
static const struct {
    const char *name;
    int version;
    const char *symbol;
} forms[] = {
    {"cuDeviceGetUuid", 11040, "cuDeviceGetUuid_v2"},
    {"cuDeviceTotalMem", 3020, "cuDeviceTotalMem_v2"},
    {"cuDevicePrimaryCtxRelease", 11000, "cuDevicePrimaryCtxRelease_v2"},
    {"cuDevicePrimaryCtxSetFlags", 11000, "cuDevicePrimaryCtxSetFlags_v2"},
    {"cuDevicePrimaryCtxReset", 11000, "cuDevicePrimaryCtxReset_v2"},
    {"cuCtxCreate", 3020, "cuCtxCreate_v2"},
    {"cuCtxCreate", 12050, "cuCtxCreate_v4"},
    {"cuCtxDestroy", 4000, "cuCtxDestroy_v2"},
    {"cuCtxPushCurrent", 4000, "cuCtxPushCurrent_v2"},
    {"cuCtxPopCurrent", 4000, "cuCtxPopCurrent_v2"},
    {"cuMemGetInfo", 3020, "cuMemGetInfo_v2"},
    {"cuMemAlloc", 3020, "cuMemAlloc_v2"},
    {"cuMemAllocPitch", 3020, "cuMemAllocPitch_v2"},
    {"cuMemFree", 3020, "cuMemFree_v2"},
    {"cuMemGetAddressRange", 3020, "cuMemGetAddressRange_v2"},
    {"cuMemAllocHost", 3020, "cuMemAllocHost_v2"},
    {"cuMemHostGetDevicePointer", 3020, "cuMemHostGetDevicePointer_v2"},
    {"cuMemHostRegister", 6050, "cuMemHostRegister_v2"},
    {"cuMemcpyHtoD", 3020, "cuMemcpyHtoD_v2"},
    {"cuMemcpyDtoH", 3020, "cuMemcpyDtoH_v2"},
    {"cuMemcpyDtoD", 3020, "cuMemcpyDtoD_v2"},
    {"cuMemcpyHtoDAsync", 3020, "cuMemcpyHtoDAsync_v2"},
    {"cuMemcpyDtoHAsync", 3020, "cuMemcpyDtoHAsync_v2"},
    {"cuMemcpyDtoDAsync", 3020, "cuMemcpyDtoDAsync_v2"},
    {"cuMemcpy2D", 3020, "cuMemcpy2D_v2"},
    {"cuMemcpy2DUnaligned", 3020, "cuMemcpy2DUnaligned_v2"},
    {"cuMemcpy2DAsync", 3020, "cuMemcpy2DAsync_v2"},
    {"cuMemsetD8", 3020, "cuMemsetD8_v2"},
    {"cuMemsetD16", 3020, "cuMemsetD16_v2"},
    {"cuMemsetD32", 3020, "cuMemsetD32_v2"},
    {"cuMemsetD2D8", 3020, "cuMemsetD2D8_v2"},
    {"cuMemsetD2D16", 3020, "cuMemsetD2D16_v2"},
    {"cuMemsetD2D32", 3020, "cuMemsetD2D32_v2"},
    {"cuStreamDestroy", 4000, "cuStreamDestroy_v2"},
    {"cuStreamBeginCapture", 10010, "cuStreamBeginCapture_v2"},
    {"cuStreamGetCaptureInfo", 11030, "cuStreamGetCaptureInfo_v2"},
    {"cuStreamGetCaptureInfo", 12030, "cuStreamGetCaptureInfo_v3"},
    {"cuStreamUpdateCaptureDependencies", 12030, "cuStreamUpdateCaptureDependencies_v2"},
    {"cuEventDestroy", 4000, "cuEventDestroy_v2"},
    {"cuEventElapsedTime", 12080, "cuEventElapsedTime_v2"},
    {"cuGraphInstantiate", 12000, "cuGraphInstantiateWithFlags"},
    {"cuGraphExecUpdate", 12000, "cuGraphExecUpdate_v2"},
    {"cuGraphGetEdges", 12030, "cuGraphGetEdges_v2"},
    {"cuGraphNodeGetDependencies", 12030, "cuGraphNodeGetDependencies_v2"},
    {"cuGraphAddDependencies", 12030, "cuGraphAddDependencies_v2"},
    {"cuGetProcAddress", 12000, "cuGetProcAddress_v2"},
};

API CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    (void)flags;
    static void *self;
    if (!self) {
        Dl_info info;
        if (dladdr((void *)&cuGetProcAddress_v2, &info))
            self = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    }
    const char *symbol = name;
    int asked = version < machine.version ? version : machine.version;
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++)
        if (!strcmp(forms[i].name, name) && forms[i].version <= asked)
            symbol = forms[i].symbol;
    *function = version / 1000 > machine.version / 1000 ? NULL : dlsym(self, symbol);
    if (status)
        *status = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}

API CUresult cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}

API CUresult cuGetExportTable(const void **table, const void *id) {
    (void)id;
    *table = NULL;
    return NOT_FOUND;
}

/* ---- start and devices ---- */

API CUresult cuInit(unsigned flags) {
    ENTER("cuInit");
    if (flags)
        return INVALID_VALUE;
    if (started && started != getpid())
        return NOT_INITIALIZED; /* a fork of a process that uses CUDA */
    if (!machine.devices)
        return 100;
    started = getpid();
    for (int i = 0; i < machine.devices; i++)
        if (!primaries[i].handle)
            primaries[i] = (Context){.handle = new_handle(CONTEXT, &primaries[i]), .device = i, .primary = true};
    return SUCCESS;
}

static CUresult known_device(CUdevice device) {
    if (started != getpid())
        return NOT_INITIALIZED;
    return device < 0 || device >= machine.devices ? INVALID_DEVICE : SUCCESS;
}

API CUresult cuDriverGetVersion(int *version) {
    ENTER("cuDriverGetVersion");
    *version = machine.version;
    return SUCCESS;
}

API CUresult cuDeviceGetCount(int *count) {
    ENTER("cuDeviceGetCount");
    CHECK(known_device(0));
    *count = machine.devices;
    return SUCCESS;
}

API CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER("cuDeviceGet");
    CHECK(known_device(ordinal));
    *device = ordinal;
    return SUCCESS;
}

API CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    ENTER("cuDeviceGetName");
    CHECK(known_device(device));
    snprintf(name, (size_t)length, "Stand-in GPU %d", device);
    return SUCCESS;
}

API CUresult cuDeviceGetUuid_v2(unsigned char *uuid, CUdevice device) {
    ENTER("cuDeviceGetUuid");
    CHECK(known_device(device));
    memset(uuid, 0x51, 16);
    uuid[15] = (unsigned char)device;
    return SUCCESS;
}

API CUresult cuDeviceGetUuid(unsigned char *uuid, CUdevice device) { return cuDeviceGetUuid_v2(uuid, device); }

API CUresult cuDeviceGetPCIBusId(char *text, int length, CUdevice device) {
    ENTER("cuDeviceGetPCIBusId");
    CHECK(known_device(device));
    snprintf(text, (size_t)length, "0000:%02X:00.0", device + 1);
    return SUCCESS;
}

API CUresult cuDeviceGetByPCIBusId(CUdevice *device, const char *text) {
    ENTER("cuDeviceGetByPCIBusId");
    unsigned bus;
    if (sscanf(text, "%*x:%x", &bus) != 1)
        return INVALID_VALUE;
    CHECK(known_device((int)bus - 1));
    *device = (int)bus - 1;
    return SUCCESS;
}

API CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    ENTER("cuDeviceTotalMem");
    CHECK(known_device(device));
    *bytes = machine.memory;
    return SUCCESS;
}

API CUresult cuDeviceComputeCapability(int *major, int *minor, CUdevice device) {
    ENTER("cuDeviceComputeCapability");
    CHECK(known_device(device));
    *major = machine.capability / 10;
    *minor = machine.capability % 10;
    return SUCCESS;
}

API CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    ENTER("cuDeviceGetAttribute");
    CHECK(known_device(device));
    const struct {
        int attribute, value;
    } known[] = {
        {1, 1024},   /* threads per block */
        {2, 1024},   {3, 1024}, {4, 64}, {5, 2147483647}, {6, 65535}, {7, 65535},
        {8, 49152},  /* shared memory per block */
        {10, 32},    /* warp */
        {13, 1500000}, {15, 1},
        {16, 132},   /* multiprocessors */
        {18, machine.integrated},
        {19, 1},     /* maps host memory */
        {31, 1}, {33, device + 1}, {34, 0}, {39, 2048}, {40, 2},
        {41, 1},     /* unified addressing */
        {50, 0},
        {75, machine.capability / 10}, {76, machine.capability % 10},
        {78, 1},     /* stream priorities */
        {83, 1},     /* managed memory */
        {88, machine.integrated},
        {91, 1}, {99, 1}, {102, 0},
        {115, machine.pools}, {119, 0},
        {134, -1}, {144, machine.pools},
    };
    *value = 0;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].attribute == attribute)
            *value = known[i].value;
    return SUCCESS;
}

API CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer) {
    ENTER("cuDeviceCanAccessPeer");
    CHECK(known_device(device));
    CHECK(known_device(peer));
    *can = 0;
    return SUCCESS;
}

/* ---- contexts ---- */

#define DEEPEST 256
static _Thread_local Context *stack[DEEPEST];
static _Thread_local int depth;

Context *current(void) { return depth ? stack[depth - 1] : NULL; }

CUresult usable_context(void) {
    if (started != getpid())
        return NOT_INITIALIZED;
    Context *context = current();
    if (!context)
        return INVALID_CONTEXT;
    if (context->destroyed || (context->primary && !context->retained))
        return CONTEXT_IS_DESTROYED;
    return context->lost;
}

static void end_context(Context *context) {
    idle(context);
    free_streams_of(context);
    free_memory_of(context);
}

API CUresult cuDevicePrimaryCtxRetain(void **context, CUdevice device) {
    ENTER("cuDevicePrimaryCtxRetain");
    CHECK(known_device(device));
    primaries[device].retained++;
    *context = primaries[device].handle;
    return SUCCESS;
}

API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    ENTER("cuDevicePrimaryCtxRelease");
    CHECK(known_device(device));
    Context *context = &primaries[device];
    if (!context->retained)
        return INVALID_CONTEXT;
    if (--context->retained == 0)
        end_context(context);
    return SUCCESS;
}

API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    ENTER("cuDevicePrimaryCtxGetState");
    CHECK(known_device(device));
    *flags = primaries[device].flags;
    *active = primaries[device].retained > 0;
    return SUCCESS;
}

API CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned flags) {
    ENTER("cuDevicePrimaryCtxSetFlags");
    CHECK(known_device(device));
    primaries[device].flags = flags;
    return SUCCESS;
}

API CUresult cuDevicePrimaryCtxReset_v2(CUdevice device) {
    ENTER("cuDevicePrimaryCtxReset");
    CHECK(known_device(device));
    end_context(&primaries[device]);
    return SUCCESS;
}

static CUresult create_context(void **handle, unsigned flags, CUdevice device) {
    CHECK(known_device(device));
    if (depth == DEEPEST)
        return OUT_OF_MEMORY;
    Context *context = zeroed(sizeof *context);
    *context = (Context){.handle = new_handle(CONTEXT, context), .device = device, .flags = flags};
    stack[depth++] = context;
    *handle = context->handle;
    return SUCCESS;
}

API CUresult cuCtxCreate_v2(void **context, unsigned flags, CUdevice device) {
    ENTER("cuCtxCreate");
    return create_context(context, flags, device);
}

API CUresult cuCtxCreate_v4(void **context, void *parameters, unsigned flags, CUdevice device) {
    ENTER("cuCtxCreate");
    (void)parameters;
    return create_context(context, flags, device);
}

API CUresult cuCtxDestroy_v2(void *handle) {
    ENTER("cuCtxDestroy");
    Context *context = object_of(handle, CONTEXT);
    if (!context || context->primary)
        return INVALID_CONTEXT;
    end_context(context);
    context->destroyed = true; /* threads that still have it on their stack may ask */
    free_handle(context->handle);
    if (current() == context)
        depth--;
    return SUCCESS;
}

/* The old way to give a context back, which pycuda goes when it ends. */
API CUresult cuCtxDetach(void *handle) {
    Context *context = object_of(handle, CONTEXT);
    if (!context)
        return INVALID_CONTEXT;
    return context->primary ? cuDevicePrimaryCtxRelease_v2(context->device) : cuCtxDestroy_v2(handle);
}

API CUresult cuCtxPushCurrent_v2(void *handle) {
    ENTER("cuCtxPushCurrent");
    Context *context = object_of(handle, CONTEXT);
    if (!context)
        return INVALID_CONTEXT;
    if (depth == DEEPEST)
        return OUT_OF_MEMORY;
    stack[depth++] = context;
    return SUCCESS;
}

API CUresult cuCtxPopCurrent_v2(void **handle) {
    ENTER("cuCtxPopCurrent");
    if (!depth)
        return INVALID_CONTEXT;
    if (handle)
        *handle = current()->handle;
    depth--;
    return SUCCESS;
}

API CUresult cuCtxSetCurrent(void *handle) {
    ENTER("cuCtxSetCurrent");
    Context *context = handle ? object_of(handle, CONTEXT) : NULL;
    if (handle && !context)
        return INVALID_CONTEXT;
    depth -= depth > 0;
    if (context)
        stack[depth++] = context;
    return SUCCESS;
}

API CUresult cuCtxGetCurrent(void **handle) {
    ENTER("cuCtxGetCurrent");
    *handle = current() ? current()->handle : NULL;
    return SUCCESS;
}

API CUresult cuCtxGetDevice(CUdevice *device) {
    ENTER_IN_CONTEXT("cuCtxGetDevice");
    *device = current()->device;
    return SUCCESS;
}

API CUresult cuCtxGetFlags(unsigned *flags) {
    ENTER_IN_CONTEXT("cuCtxGetFlags");
    *flags = current()->flags;
    return SUCCESS;
}

API CUresult cuCtxGetId(void *handle, unsigned long long *id) {
    ENTER("cuCtxGetId");
    Context *context = handle ? object_of(handle, CONTEXT) : current();
    if (!context)
        return CONTEXT_IS_DESTROYED;
    *id = (unsigned long long)(uintptr_t)context;
    return SUCCESS;
}

API CUresult cuCtxGetApiVersion(void *handle, unsigned *version) {
    ENTER("cuCtxGetApiVersion");
    (void)handle;
    *version = 3020;
    return SUCCESS;
}

API CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    ENTER_IN_CONTEXT("cuCtxGetStreamPriorityRange");
    if (least)
        *least = 0;
    if (greatest)
        *greatest = -5;
    return SUCCESS;
}

API CUresult cuCtxSynchronize(void) {
    ENTER_IN_CONTEXT("cuCtxSynchronize");
    CHECK(no_capture_in(current()));
    idle(current());
    trim_pools();
    return current()->lost;
}
