/* Memory of devices and page-locked memory of the host, with a budget and guards. */
#define _GNU_SOURCE
#include "standin.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096UL
#define REGION (1UL << 36) /* address space that is reserved at a time */
#define MOST_FILLED (64UL << 20)
#define UNINITIALISED 0xEE
#define GUARD 0xA5

static Block **blocks; /* by address */
static size_t block_count, block_room;
static uint64_t next_id = 1;
static uintptr_t region, region_end;

/* Where a block would be that starts at an address, or the first one behind it. */
static size_t place_of(uintptr_t address) {
    size_t low = 0, high = block_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (blocks[middle]->start <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

Block *block_at(uintptr_t address) {
    size_t place = place_of(address);
    Block *block = place ? blocks[place - 1] : NULL;
    return block && address - block->start < (block->size ? block->size : 1) ? block : NULL;
}

static void list_block(Block *block) {
    if (block_count == block_room) {
        block_room = block_room ? 2 * block_room : 256;
        blocks = realloc(blocks, block_room * sizeof *blocks);
        if (!blocks)
            abort();
    }
    size_t place = place_of(block->start);
    memmove(blocks + place + 1, blocks + place, (block_count - place) * sizeof *blocks);
    blocks[place] = block;
    block_count++;
}

static void unlist_block(Block *block) {
    size_t place = place_of(block->start) - 1;
    block_count--;
    memmove(blocks + place, blocks + place + 1, (block_count - place) * sizeof *blocks);
}

static void check_guard(const Block *block) {
    if (block->memory == REGISTERED_MEMORY)
        return;
    const unsigned char *bytes = (const unsigned char *)block->start;
    for (size_t i = block->size; i < block->mapped; i++)
        if (bytes[i] != GUARD) {
            violation("something wrote behind the %zu bytes at %#lx", block->size, (unsigned long)block->start);
            return;
        }
}

void check_guards(void) {
    for (size_t i = 0; i < block_count; i++)
        check_guard(blocks[i]);
}

static bool counts(const Block *block) {
    return block->memory == DEVICE_MEMORY || block->memory == MANAGED_MEMORY ||
           (machine.integrated && block->memory == HOST_MEMORY);
}

/* Bytes of a device that are taken; those of a pool include what it keeps for later. */
static size_t taken(CUdevice device) {
    size_t bytes = 0;
    for (size_t i = 0; i < block_count; i++)
        if (counts(blocks[i]) && blocks[i]->device == device && !blocks[i]->pool)
            bytes += blocks[i]->size;
    return bytes;
}

size_t available(CUdevice device) {
    size_t used = taken(device) + reserved_by_pools(device);
    return used < machine.memory ? machine.memory - used : 0;
}

/* Addresses between two pages that nobody may touch. */
static uintptr_t new_addresses(size_t size) {
    size_t span = size + 2 * PAGE;
    if (!region || region_end - region < span) {
        size_t room = span > REGION ? span : REGION;
        void *found = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (found == MAP_FAILED)
            return 0;
        region = (uintptr_t)found;
        region_end = region + room;
    }
    uintptr_t start = region + PAGE;
    region += size + PAGE;
    return mprotect((void *)start, size, PROT_READ | PROT_WRITE) ? 0 : start;
}

CUresult new_block(Block **made, size_t size, enum memory memory, unsigned flags) {
    size_t mapped = (size + PAGE - 1) / PAGE * PAGE;
    uintptr_t start = new_addresses(mapped);
    if (!start)
        return OUT_OF_MEMORY;
    memset((void *)start, UNINITIALISED, size < MOST_FILLED ? size : MOST_FILLED);
    memset((void *)(start + size), GUARD, mapped - size);
    Block *block = zeroed(sizeof *block);
    *block = (Block){.start = start, .size = size, .mapped = mapped, .memory = memory, .flags = flags,
                     .context = current(), .device = current() ? current()->device : 0, .id = next_id++};
    list_block(block);
    *made = block;
    return SUCCESS;
}

void free_block(Block *block) {
    check_guard(block);
    unlist_block(block);
    if (block->pool) {
        block->pool->used -= block->size;
        block->pool->blocks--;
    }
    if (block->memory != REGISTERED_MEMORY)
        mmap((void *)block->start, block->mapped, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    free(block);
}

void free_memory_of(Context *context) {
    for (size_t i = block_count; i-- > 0;)
        if (blocks[i]->context == context && !blocks[i]->pool)
            free_block(blocks[i]);
}

CUresult range_known(uintptr_t address, size_t size, const char *what) {
    Block *block = block_at(address);
    if (!block) {
        violation("%s of %zu bytes at %#lx, which is not allocated", what, size, (unsigned long)address);
        return INVALID_VALUE;
    }
    if (size > block->start + block->size - address) {
        violation("%s of %zu bytes at %#lx, which end behind their %zu bytes", what, size, (unsigned long)address,
                  block->size);
        return INVALID_VALUE;
    }
    return SUCCESS;
}

bool usable_now(uintptr_t address, size_t size, const char *what) {
    Block *block = block_at(address);
    if (!block || size > block->start + block->size - address) {
        violation("%s of %zu bytes at %#lx, which was freed before the work ran", what, size, (unsigned long)address);
        return false;
    }
    if (block->state == ALLOCATING) {
        violation("%s of %zu bytes at %#lx, before its stream came to the allocation", what, size,
                  (unsigned long)address);
        return false;
    }
    return true;
}

size_t live_blocks(bool host) {
    size_t count = 0;
    for (size_t i = 0; i < block_count; i++)
        count += (blocks[i]->memory == HOST_MEMORY) == host && blocks[i]->memory != REGISTERED_MEMORY;
    return count;
}

/* Bytes that are allocated: on devices, or page-locked ones of the host. */
API size_t standin_live_bytes(int host) {
    pthread_mutex_lock(&lock);
    size_t bytes = 0;
    for (size_t i = 0; i < block_count; i++)
        if ((blocks[i]->memory == HOST_MEMORY) == (host != 0) && blocks[i]->memory != REGISTERED_MEMORY)
            bytes += blocks[i]->size;
    pthread_mutex_unlock(&lock);
    return bytes;
}

/* Is a range of memory allocated? For tests that read or write the memory of a device. */
API int standin_range_is_known(CUdeviceptr address, size_t size) {
    pthread_mutex_lock(&lock);
    int known = range_known((uintptr_t)address, size, "access of a test") == SUCCESS;
    pthread_mutex_unlock(&lock);
    return known;
}

/* Memory of the first device that belongs to a test: nothing counts it as a call, and no call fails for it. */
API CUdeviceptr standin_allocate(size_t size) {
    pthread_mutex_lock(&lock);
    Block *block = NULL;
    new_block(&block, size, DEVICE_MEMORY, 0);
    if (block)
        block->context = NULL;
    pthread_mutex_unlock(&lock);
    return block ? block->start : 0;
}

API void standin_free(CUdeviceptr pointer) {
    pthread_mutex_lock(&lock);
    Block *block = block_at((uintptr_t)pointer);
    if (block)
        free_block(block);
    pthread_mutex_unlock(&lock);
}

/* ---- allocate and free ---- */

API CUresult cuMemGetInfo_v2(size_t *available_bytes, size_t *total) {
    ENTER_IN_CONTEXT("cuMemGetInfo");
    *available_bytes = available(current()->device);
    *total = machine.memory;
    return SUCCESS;
}

static CUresult allocate(CUdeviceptr *pointer, size_t size, enum memory memory, unsigned flags) {
    if (!size)
        return INVALID_VALUE;
    CHECK(safe_during_capture());
    if ((memory != HOST_MEMORY || machine.integrated) && size > available(current()->device))
        return OUT_OF_MEMORY;
    Block *block;
    CHECK(new_block(&block, size, memory, flags));
    *pointer = block->start;
    return SUCCESS;
}

API CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t size) {
    ENTER_IN_CONTEXT("cuMemAlloc");
    return allocate(pointer, size, DEVICE_MEMORY, 0);
}

API CUresult cuMemAllocManaged(CUdeviceptr *pointer, size_t size, unsigned flags) {
    ENTER_IN_CONTEXT("cuMemAllocManaged");
    return allocate(pointer, size, MANAGED_MEMORY, flags);
}

API CUresult cuMemAllocPitch_v2(CUdeviceptr *pointer, size_t *pitch, size_t width, size_t height, unsigned element) {
    ENTER_IN_CONTEXT("cuMemAllocPitch");
    (void)element;
    *pitch = (width + 511) / 512 * 512;
    return allocate(pointer, *pitch * height, DEVICE_MEMORY, 0);
}

API CUresult cuMemFree_v2(CUdeviceptr pointer) {
    ENTER_IN_CONTEXT("cuMemFree");
    if (!pointer)
        return SUCCESS;
    CHECK(safe_during_capture());
    Block *block = block_at((uintptr_t)pointer);
    if (!block || block->start != pointer || block->memory == HOST_MEMORY || block->memory == REGISTERED_MEMORY) {
        violation("cuMemFree of %#llx, which is not the start of memory of a device", pointer);
        return INVALID_VALUE;
    }
    idle(current()); /* as the real one waits */
    if (block_at((uintptr_t)pointer) != block) {
        violation("cuMemFree of %#llx, which a stream freed", pointer);
        return INVALID_VALUE;
    }
    free_block(block);
    return SUCCESS;
}

API CUresult cuMemHostAlloc(void **pointer, size_t size, unsigned flags) {
    ENTER_IN_CONTEXT("cuMemHostAlloc");
    CUdeviceptr found;
    CHECK(allocate(&found, size, HOST_MEMORY, flags));
    *pointer = (void *)(uintptr_t)found;
    return SUCCESS;
}

API CUresult cuMemAllocHost_v2(void **pointer, size_t size) {
    ENTER_IN_CONTEXT("cuMemAllocHost");
    CUdeviceptr found;
    CHECK(allocate(&found, size, HOST_MEMORY, 0));
    *pointer = (void *)(uintptr_t)found;
    return SUCCESS;
}

API CUresult cuMemFreeHost(void *pointer) {
    ENTER_IN_CONTEXT("cuMemFreeHost");
    CHECK(safe_during_capture());
    Block *block = block_at((uintptr_t)pointer);
    if (!block || block->start != (uintptr_t)pointer || block->memory != HOST_MEMORY) {
        violation("cuMemFreeHost of %p, which is not the start of page-locked memory", pointer);
        return INVALID_VALUE;
    }
    free_block(block); /* without a wait: work that still uses it is a violation when it runs */
    return SUCCESS;
}

API CUresult cuMemHostRegister_v2(void *pointer, size_t size, unsigned flags) {
    ENTER_IN_CONTEXT("cuMemHostRegister");
    if (!pointer || !size)
        return INVALID_VALUE;
    size_t place = place_of((uintptr_t)pointer);
    bool overlaps = block_at((uintptr_t)pointer) ||
                    (place < block_count && blocks[place]->start < (uintptr_t)pointer + size);
    if (overlaps)
        return HOST_MEMORY_ALREADY_REGISTERED;
    Block *block = zeroed(sizeof *block);
    *block = (Block){.start = (uintptr_t)pointer, .size = size, .mapped = size, .memory = REGISTERED_MEMORY,
                     .flags = flags, .context = current(), .device = current()->device, .id = next_id++};
    list_block(block);
    return SUCCESS;
}

API CUresult cuMemHostUnregister(void *pointer) {
    ENTER_IN_CONTEXT("cuMemHostUnregister");
    Block *block = block_at((uintptr_t)pointer);
    if (!block || block->start != (uintptr_t)pointer || block->memory != REGISTERED_MEMORY)
        return HOST_MEMORY_NOT_REGISTERED;
    free_block(block);
    return SUCCESS;
}

API CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *device, void *pointer, unsigned flags) {
    ENTER_IN_CONTEXT("cuMemHostGetDevicePointer");
    (void)flags;
    Block *block = block_at((uintptr_t)pointer);
    if (!block || block->memory == DEVICE_MEMORY)
        return INVALID_VALUE;
    *device = (uintptr_t)pointer;
    return SUCCESS;
}

API CUresult cuMemHostGetFlags(unsigned *flags, void *pointer) {
    ENTER_IN_CONTEXT("cuMemHostGetFlags");
    Block *block = block_at((uintptr_t)pointer);
    if (!block || block->memory == DEVICE_MEMORY)
        return INVALID_VALUE;
    *flags = block->flags;
    return SUCCESS;
}

/* ---- questions about pointers ---- */

API CUresult cuMemGetAddressRange_v2(CUdeviceptr *start, size_t *size, CUdeviceptr pointer) {
    ENTER_IN_CONTEXT("cuMemGetAddressRange");
    Block *block = block_at((uintptr_t)pointer);
    if (!block)
        return NOT_FOUND;
    if (start)
        *start = block->start;
    if (size)
        *size = block->size;
    return SUCCESS;
}

static CUresult attribute_of(const Block *block, void *data, int attribute, CUdeviceptr pointer) {
    bool host = block->memory == HOST_MEMORY || block->memory == REGISTERED_MEMORY;
    switch (attribute) {
    case 1:
        *(void **)data = block->context ? block->context->handle : NULL;
        return SUCCESS;
    case 2:
        *(unsigned *)data = host ? 1 : 2;
        return SUCCESS;
    case 3:
        *(CUdeviceptr *)data = pointer;
        return SUCCESS;
    case 4:
        if (block->memory == DEVICE_MEMORY)
            return INVALID_VALUE;
        *(uintptr_t *)data = (uintptr_t)pointer;
        return SUCCESS;
    case 6:
    case 10:
    case 15:
        *(unsigned *)data = 0;
        return SUCCESS;
    case 7:
        *(uint64_t *)data = block->id;
        return SUCCESS;
    case 8:
        *(unsigned *)data = block->memory == MANAGED_MEMORY;
        return SUCCESS;
    case 9:
        *(int *)data = block->device;
        return SUCCESS;
    case 11:
        *(CUdeviceptr *)data = block->start;
        return SUCCESS;
    case 12:
        *(size_t *)data = block->size;
        return SUCCESS;
    case 13:
        *(unsigned *)data = 1;
        return SUCCESS;
    case 14:
        *(uint64_t *)data = 0;
        return SUCCESS;
    case 16:
        *(int *)data = 3; /* read and write */
        return SUCCESS;
    case 17:
        *(void **)data = block->pool ? block->pool->handle : NULL;
        return SUCCESS;
    default:
        return INVALID_VALUE;
    }
}

API CUresult cuPointerGetAttribute(void *data, int attribute, CUdeviceptr pointer) {
    ENTER_IN_CONTEXT("cuPointerGetAttribute");
    Block *block = block_at((uintptr_t)pointer);
    return block ? attribute_of(block, data, attribute, pointer) : INVALID_VALUE;
}

API CUresult cuPointerGetAttributes(unsigned count, const int *attributes, void **data, CUdeviceptr pointer) {
    ENTER_IN_CONTEXT("cuPointerGetAttributes");
    Block *block = block_at((uintptr_t)pointer);
    for (unsigned i = 0; i < count; i++) {
        if (block && attribute_of(block, data[i], attributes[i], pointer) == SUCCESS)
            continue;
        size_t size = attributes[i] == 2 || attributes[i] == 8 || attributes[i] == 9 ? 4 : 8;
        memset(data[i], 0, size); /* memory of the host that the driver does not know */
        if (attributes[i] == 9)
            *(int *)data[i] = -2; /* CU_DEVICE_INVALID */
    }
    return SUCCESS;
}
