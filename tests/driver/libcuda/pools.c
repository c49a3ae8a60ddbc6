/* Pools of memory, which is allocated and freed in the order of streams. */
#include "standin.h"

#include <stdlib.h>

#define MOST_POOLS 256
static Pool *pools[MOST_POOLS];
static size_t pool_count;
static Pool *default_pools[MOST_DEVICES], *current_pools[MOST_DEVICES];

size_t reserved_by_pools(CUdevice device) {
    size_t bytes = 0;
    for (size_t i = 0; i < pool_count; i++)
        if (pools[i]->device == device && (pools[i]->memory == DEVICE_MEMORY || machine.integrated))
            bytes += pools[i]->reserved;
    return bytes;
}

typedef struct Location {
    int type, id; /* 1: a device, 2 to 4: the host */
} Location;

typedef struct PoolProperties {
    int allocation_type, handle_types;
    Location location;
    void *security;
    size_t most;
    unsigned short usage;
    unsigned char reserved[54];
} PoolProperties;

static Pool *new_pool(CUdevice device, enum memory memory) {
    if (pool_count == MOST_POOLS)
        abort();
    Pool *pool = zeroed(sizeof *pool);
    *pool = (Pool){.device = device, .memory = memory, .reuse = {1, 1, 1}};
    pool->handle = new_handle(POOL, pool);
    pools[pool_count++] = pool;
    return pool;
}

static void end_pool_if_unused(Pool *pool) {
    if (!pool->deleted || pool->blocks)
        return;
    for (size_t i = 0; i < pool_count; i++)
        if (pools[i] == pool)
            pools[i] = pools[--pool_count];
    free(pool);
}

/* As the real driver does at every wait: gives back what a pool keeps beyond its threshold. */
void trim_pools(void) {
    for (size_t i = pool_count; i-- > 0;) {
        Pool *pool = pools[i];
        uint64_t kept = pool->used > pool->threshold ? pool->used : pool->threshold;
        if (pool->reserved > kept)
            pool->reserved = kept;
        end_pool_if_unused(pool);
    }
}

static CUresult default_pool(Pool **pool, CUdevice device) {
    if (!machine.pools)
        return NOT_SUPPORTED;
    if (device < 0 || device >= machine.devices)
        return INVALID_DEVICE;
    if (!default_pools[device])
        default_pools[device] = current_pools[device] = new_pool(device, DEVICE_MEMORY);
    *pool = default_pools[device];
    return SUCCESS;
}

API CUresult cuDeviceGetDefaultMemPool(void **handle, CUdevice device) {
    ENTER("cuDeviceGetDefaultMemPool");
    Pool *pool;
    CHECK(default_pool(&pool, device));
    *handle = pool->handle;
    return SUCCESS;
}

API CUresult cuDeviceGetMemPool(void **handle, CUdevice device) {
    ENTER("cuDeviceGetMemPool");
    Pool *pool;
    CHECK(default_pool(&pool, device));
    *handle = current_pools[device]->handle;
    return SUCCESS;
}

API CUresult cuDeviceSetMemPool(CUdevice device, void *handle) {
    ENTER("cuDeviceSetMemPool");
    Pool *pool;
    CHECK(default_pool(&pool, device));
    pool = object_of(handle, POOL);
    if (!pool)
        return INVALID_VALUE;
    current_pools[device] = pool;
    return SUCCESS;
}

API CUresult cuMemPoolCreate(void **handle, const PoolProperties *properties) {
    ENTER("cuMemPoolCreate");
    if (!machine.pools || properties->handle_types)
        return NOT_SUPPORTED; /* no pool is shared between processes */
    bool device = properties->location.type == 1;
    *handle = new_pool(device ? properties->location.id : 0, device ? DEVICE_MEMORY : HOST_MEMORY)->handle;
    return SUCCESS;
}

API CUresult cuMemPoolDestroy(void *handle) {
    ENTER("cuMemPoolDestroy");
    Pool *pool = object_of(handle, POOL);
    if (!pool)
        return INVALID_VALUE;
    for (int i = 0; i < machine.devices; i++) {
        if (default_pools[i] == pool)
            return INVALID_VALUE;
        if (current_pools[i] == pool)
            current_pools[i] = default_pools[i];
    }
    free_handle(pool->handle);
    pool->deleted = true;
    end_pool_if_unused(pool);
    return SUCCESS;
}

API CUresult cuMemPoolTrimTo(void *handle, size_t kept) {
    ENTER("cuMemPoolTrimTo");
    Pool *pool = object_of(handle, POOL);
    if (!pool)
        return INVALID_VALUE;
    kept = kept > pool->used ? kept : pool->used;
    if (pool->reserved > kept)
        pool->reserved = kept;
    return SUCCESS;
}

static uint64_t *statistic(Pool *pool, int attribute) {
    switch (attribute) {
    case 4:
        return &pool->threshold;
    case 5:
        return &pool->reserved;
    case 6:
        return &pool->reserved_high;
    case 7:
        return &pool->used;
    case 8:
        return &pool->used_high;
    default:
        return NULL;
    }
}

API CUresult cuMemPoolGetAttribute(void *handle, int attribute, void *value) {
    ENTER("cuMemPoolGetAttribute");
    Pool *pool = object_of(handle, POOL);
    if (!pool)
        return INVALID_VALUE;
    if (attribute >= 1 && attribute <= 3)
        *(int *)value = pool->reuse[attribute - 1];
    else if (statistic(pool, attribute))
        *(uint64_t *)value = *statistic(pool, attribute);
    else
        return INVALID_VALUE;
    return SUCCESS;
}

API CUresult cuMemPoolSetAttribute(void *handle, int attribute, void *value) {
    ENTER("cuMemPoolSetAttribute");
    Pool *pool = object_of(handle, POOL);
    if (!pool)
        return INVALID_VALUE;
    if (attribute >= 1 && attribute <= 3)
        pool->reuse[attribute - 1] = *(int *)value;
    else if (attribute == 4)
        pool->threshold = *(uint64_t *)value;
    else if (attribute == 6)
        pool->reserved_high = pool->reserved;
    else if (attribute == 8)
        pool->used_high = pool->used;
    else
        return INVALID_VALUE;
    return SUCCESS;
}

API CUresult cuMemPoolSetAccess(void *handle, const void *accesses, size_t count) {
    ENTER("cuMemPoolSetAccess");
    (void)accesses;
    (void)count;
    return object_of(handle, POOL) ? SUCCESS : INVALID_VALUE;
}

API CUresult cuMemPoolGetAccess(int *flags, void *handle, const Location *location) {
    ENTER("cuMemPoolGetAccess");
    Pool *pool = object_of(handle, POOL);
    if (!pool)
        return INVALID_VALUE;
    *flags = location->type == 1 && location->id == pool->device ? 3 : 0;
    return SUCCESS;
}

static CUresult allocate_in_order(CUdeviceptr *pointer, size_t size, Pool *pool, const void *handle) {
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    if (!size)
        return INVALID_VALUE;
    if (stream->capture)
        return NOT_SUPPORTED; /* graphs that allocate */
    if (pool->used + size > pool->reserved && pool->used + size - pool->reserved > available(pool->device)) {
        drain(stream); /* what it frees may be used again behind it */
        trim_pools();
        if (pool->used + size > pool->reserved && pool->used + size - pool->reserved > available(pool->device))
            return OUT_OF_MEMORY;
    }
    Block *block;
    CHECK(new_block(&block, size, pool->memory, 0));
    block->pool = pool;
    block->device = pool->device;
    block->state = ALLOCATING;
    pool->blocks++;
    pool->used += size;
    if (pool->used > pool->used_high)
        pool->used_high = pool->used;
    if (pool->used > pool->reserved)
        pool->reserved = pool->used;
    if (pool->reserved > pool->reserved_high)
        pool->reserved_high = pool->reserved;
    *pointer = block->start;
    return enqueue(stream, &(Op){.work = ALLOCATE, .block = block->start});
}

API CUresult cuMemAllocAsync(CUdeviceptr *pointer, size_t size, const void *stream) {
    ENTER_IN_CONTEXT("cuMemAllocAsync");
    Pool *pool;
    CHECK(default_pool(&pool, current()->device));
    return allocate_in_order(pointer, size, current_pools[current()->device], stream);
}

API CUresult cuMemAllocFromPoolAsync(CUdeviceptr *pointer, size_t size, void *handle, const void *stream) {
    ENTER_IN_CONTEXT("cuMemAllocFromPoolAsync");
    Pool *pool = object_of(handle, POOL);
    return pool ? allocate_in_order(pointer, size, pool, stream) : INVALID_VALUE;
}

API CUresult cuMemFreeAsync(CUdeviceptr pointer, const void *handle) {
    ENTER_IN_CONTEXT("cuMemFreeAsync");
    if (!machine.pools)
        return NOT_SUPPORTED;
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    Block *block = block_at((uintptr_t)pointer);
    if (!block || block->start != pointer || block->freeing) {
        violation("cuMemFreeAsync of %#llx, which is not the start of allocated memory", pointer);
        return INVALID_VALUE;
    }
    if (stream->capture)
        return NOT_SUPPORTED;
    block->freeing = true;
    return enqueue(stream, &(Op){.work = FREE, .block = block->start});
}
