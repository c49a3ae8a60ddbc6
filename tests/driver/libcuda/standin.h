/* A stand-in for NVIDIA's libcuda.so.1, for machines without a GPU.
 *
 * Work on a stream stays in its queue until somebody has to wait for it, and then runs as late as CUDA allows. So order
 * between streams comes from events and waits alone: a program that forgets a wait gets wrong data every time.
 *
 * Memory of the device is host memory with a guard around it. Its addresses are never given out twice.
 *
 * The environment chooses the machine, when the library is loaded:
 *   STANDIN_VERSION     the CUDA version of the driver: 12090 (default), 13000
 *   STANDIN_DEVICES     number of GPUs: 1
 *   STANDIN_CAPABILITY  compute capability: 90
 *   STANDIN_MEMORY      bytes of memory of each GPU: 1073741824
 *   STANDIN_INTEGRATED  1: the GPU shares the memory of the CPU, as on Jetson; page-locked memory counts, too
 *   STANDIN_POOLS       0: without memory pools
 *   STANDIN_EAGER       1: work runs as soon as it is enqueued
 *   STANDIN_ABORT       1: a violation ends the process
 */
#ifndef STANDIN_H
#define STANDIN_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))

typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    CONTEXT_IS_DESTROYED = 709,
    HOST_MEMORY_ALREADY_REGISTERED = 712,
    HOST_MEMORY_NOT_REGISTERED = 713,
    NOT_PERMITTED = 800,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_MERGE = 902,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_UNJOINED = 904,
    CAPTURE_ISOLATION = 905,
    CAPTURE_IMPLICIT = 906,
    CAPTURED_EVENT = 907,
    CAPTURE_WRONG_THREAD = 908,
};

/* ---- what callers hold: handles, which stay readable after their object is gone, and are given out again ---- */

enum kind { NO_KIND, STREAM, EVENT, GRAPH, EXEC, POOL, CONTEXT, USER_OBJECT, KINDS };

typedef struct Handle {
    enum kind kind; /* NO_KIND: free */
    void *object;
    struct Handle *next_free;
} Handle;

Handle *new_handle(enum kind kind, void *object);
void free_handle(Handle *handle);
void *object_of(const void *handle, enum kind kind); /* NULL for a handle that is not one of this kind */
size_t live_handles(enum kind kind);

/* ---- what every function of the driver does first ---- */

typedef struct Counter {
    const char *name;
    size_t calls;
    bool listed;
    struct Counter *next;
} Counter;

/* Counts a call and takes the lock; answers the error that a test asked for. */
CUresult enter(Counter *counter, bool *locked);
void leave(bool *locked);

#define ENTER(symbol)                                             \
    static Counter counter_ = {symbol, 0, false, NULL};           \
    __attribute__((cleanup(leave))) bool locked_ = false;         \
    CUresult entered_ = enter(&counter_, &locked_);               \
    if (entered_)                                                 \
    return entered_
#define ENTER_IN_CONTEXT(symbol)                                  \
    ENTER(symbol);                                                \
    CUresult usable_ = usable_context();                          \
    if (usable_)                                                  \
    return usable_
#define CHECK(call)                                               \
    do {                                                          \
        CUresult checked_ = (call);                               \
        if (checked_)                                             \
            return checked_;                                      \
    } while (0)
#define STUB(symbol)                                              \
    API CUresult symbol(void) {                                   \
        ENTER(#symbol);                                           \
        return NOT_SUPPORTED;                                     \
    }

extern pthread_mutex_t lock;
extern pthread_cond_t something_ran;

typedef struct Machine {
    int version, devices, capability;
    size_t memory;
    bool integrated, pools, eager, abort;
} Machine;

extern Machine machine;

void violation(const char *format, ...) __attribute__((format(printf, 1, 2)));
void *zeroed(size_t size);
extern _Thread_local bool in_host_function;

/* ---- contexts ---- */

typedef struct Context {
    Handle *handle;
    CUdevice device;
    unsigned flags;
    int retained;       /* of a primary context */
    bool primary, destroyed;
    CUresult lost;      /* an error of the GPU, which stays */
} Context;

#define MOST_DEVICES 8

Context *current(void);
void forget_losses(void);
CUresult usable_context(void);

/* ---- memory ---- */

enum memory { DEVICE_MEMORY, HOST_MEMORY, REGISTERED_MEMORY, MANAGED_MEMORY };
enum state { LIVE, ALLOCATING }; /* ALLOCATING: its stream has not come to the allocation yet */

typedef struct Pool {
    Handle *handle;
    CUdevice device;
    enum memory memory;
    int reuse[3];
    uint64_t threshold, reserved, reserved_high, used, used_high;
    size_t blocks;
    bool deleted;
} Pool;

typedef struct Block {
    uintptr_t start;
    size_t size, mapped;
    enum memory memory;
    enum state state;
    Context *context;
    CUdevice device;
    unsigned flags;
    uint64_t id;
    Pool *pool;
    bool freeing; /* a stream will free it */
} Block;

Block *block_at(uintptr_t address); /* NULL for memory that the driver does not know */
CUresult range_known(uintptr_t address, size_t size, const char *what);
bool usable_now(uintptr_t address, size_t size, const char *what);
size_t available(CUdevice device);
size_t reserved_by_pools(CUdevice device);
CUresult new_block(Block **made, size_t size, enum memory memory, unsigned flags);
void free_block(Block *block);
void free_memory_of(Context *context);
void trim_pools(void);
void check_guards(void);
size_t live_blocks(bool host);

/* ---- work ---- */

typedef struct Stream Stream;

/* A place in the queue of a stream: done once the stream has come to it. */
typedef struct Mark {
    int references;
    bool done;
    double clock; /* microseconds of simulated time */
    Stream *stream;
} Mark;

enum work { COPY, SET, HOST_FUNCTION, KERNEL, MARK, WAIT, ALLOCATE, FREE, EMPTY, CHILD };

typedef struct Op {
    struct Op *next;
    enum work work;
    union {
        struct {
            uintptr_t to, from;
            size_t width, height, to_pitch, from_pitch;
            bool to_known, from_known; /* to the driver, when the work was enqueued */
            void *staged;              /* a copy of pageable memory */
        } copy;
        struct {
            uintptr_t to;
            size_t width, height, pitch, element;
            unsigned value;
        } set;
        struct {
            void (*function)(void *);
            void *data;
        } call;
        Mark *mark;
        uintptr_t block;
        struct Graph *child;
    };
} Op;

typedef struct Node {
    Op op;
    struct Graph *graph;
    struct Node **dependencies;
    size_t count, number;
} Node;

typedef struct UserObject {
    Handle *handle;
    void (*destroy)(void *);
    void *data;
    unsigned references;
} UserObject;

typedef struct Graph {
    Handle *handle; /* NULL for a child */
    Node **nodes;
    size_t count;
    UserObject **objects;
    size_t object_count;
    bool capturing, orphan; /* orphan: destroyed during its capture */
} Graph;

typedef struct Capture {
    int references;
    Graph *graph;
    bool own_graph, active, invalidated;
    int mode;
    pthread_t thread;
    Stream *origin;
    uint64_t id;
    struct Capture *next;
} Capture;

struct Stream {
    Handle *handle; /* NULL once it is destroyed */
    Context *context;
    unsigned flags;
    int priority;
    uint64_t id;
    Op *head, *tail;
    size_t pending;
    int references;
    bool running, is_default;
    pthread_t runner;
    double clock;
    Capture *capture;
    Node **tips; /* the nodes that captured work of this stream comes after */
    size_t tip_count;
    Stream *next;
};

CUresult stream_of(const void *handle, Stream **stream);
CUresult enqueue(Stream *stream, const Op *op);
Mark *mark_now(Stream *stream); /* NULL when nothing is pending; the caller owns a reference */
void release_mark(Mark *mark);
void run_until(Mark *mark);
void drain(Stream *stream);
Mark *new_mark(Stream *stream);
bool is_legacy(const Stream *stream);
bool runs_here(const Stream *stream);
void run_one(Stream *stream);
void push(Stream *stream, const Op *op);
void push_wait(Stream *stream, Mark *mark);
void order_with_legacy(Stream *stream);

Graph *new_graph(void);
void free_graph(Graph *graph);
CUresult graph_of(const void *handle, Graph **graph);
Node *add_node(Graph *graph, const Op *op, Node *const *dependencies, size_t count);
void idle(Context *context);
void free_streams_of(Context *context);
void launch_nodes(Stream *stream, Node *const *nodes, size_t count);

enum { GLOBAL_CAPTURE, THREAD_LOCAL_CAPTURE, RELAXED_CAPTURE };

CUresult safe_during_capture(void);
CUresult no_capture_in(Context *context);
CUresult no_implicit_wait(Context *context);
CUresult capture_op(Stream *stream, const Op *op);
void set_tips(Stream *stream, Node *const *nodes, size_t count);
void add_tips(Stream *stream, Node *const *nodes, size_t count);
void join_capture(Stream *stream, Capture *capture);
void release_capture(Capture *capture);
void invalidate(Capture *capture);
void leave_capture(Stream *stream);
void leave_all(Capture *capture);

#endif
