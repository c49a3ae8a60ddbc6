/* Streams: queues of work that run when somebody waits. */
#include "standin.h"

#include <stdlib.h>
#include <string.h>

#define MOST_PENDING 1024 /* a stream that has more runs its oldest work, as the real driver makes its caller wait */
#define NON_BLOCKING 1

static Stream *streams; /* all that exist, and destroyed ones with work */
static uint64_t next_stream_id = 1;
static double cost_of_work = 1; /* simulated microseconds */

/* Simulated time that each piece of work takes, for the times between events. */
API void standin_delay_us(double microseconds) { cost_of_work = microseconds; }

/* ---- streams by handle ---- */

static Stream *new_stream(Context *context, unsigned flags, int priority) {
    Stream *stream = zeroed(sizeof *stream);
    *stream = (Stream){.context = context, .flags = flags, .priority = priority, .id = next_stream_id++,
                       .next = streams};
    streams = stream;
    return stream;
}

static Stream *legacy_of(Context *context) {
    for (Stream *stream = streams; stream; stream = stream->next)
        if (stream->is_default && stream->context == context && stream->priority == 0)
            return stream;
    Stream *stream = new_stream(context, 0, 0);
    stream->is_default = true;
    return stream;
}

static _Thread_local Stream *per_thread;
static _Thread_local Context *per_thread_context;

CUresult stream_of(const void *handle, Stream **stream) {
    uintptr_t number = (uintptr_t)handle;
    if (number < 2) {
        *stream = legacy_of(current());
        return no_implicit_wait(current());
    }
    if (number == 2) {
        if (per_thread_context != current()) {
            per_thread = new_stream(current(), 0, 1);
            per_thread->is_default = true;
            per_thread_context = current();
        }
        *stream = per_thread;
        return SUCCESS;
    }
    *stream = object_of(handle, STREAM);
    if (!*stream) {
        violation("work on stream %p, which does not exist", handle);
        return INVALID_HANDLE;
    }
    return (*stream)->context->lost;
}

bool is_legacy(const Stream *stream) { return stream->is_default && stream->priority == 0; }

static void free_stream_if_unused(Stream *stream) {
    if (stream->handle || stream->is_default || stream->head || stream->references || stream->running)
        return;
    for (Stream **place = &streams; *place; place = &(*place)->next)
        if (*place == stream) {
            *place = stream->next;
            break;
        }
    free(stream->tips);
    free(stream);
}

/* ---- marks ---- */

Mark *new_mark(Stream *stream) {
    Mark *mark = zeroed(sizeof *mark);
    *mark = (Mark){.references = 1, .stream = stream};
    stream->references++;
    return mark;
}

void release_mark(Mark *mark) {
    if (mark && --mark->references == 0) {
        if (mark->stream) {
            mark->stream->references--;
            free_stream_if_unused(mark->stream);
        }
        free(mark);
    }
}

/* ---- running ---- */

static void lose(Stream *stream) { stream->context->lost = ILLEGAL_ADDRESS; }

static bool run_copy(const Op *op) {
    size_t rows = op->copy.height, width = op->copy.width;
    size_t to_span = (rows - 1) * op->copy.to_pitch + width, from_span = (rows - 1) * op->copy.from_pitch + width;
    if (op->copy.to_known && !usable_now(op->copy.to, to_span, "copy to memory"))
        return false;
    if (op->copy.from_known && !usable_now(op->copy.from, from_span, "copy from memory"))
        return false;
    const char *from = op->copy.staged ? op->copy.staged : (const char *)op->copy.from;
    for (size_t row = 0; row < rows; row++)
        memmove((char *)op->copy.to + row * op->copy.to_pitch, from + row * op->copy.from_pitch, width);
    return true;
}

static bool run_set(const Op *op) {
    size_t bytes = op->set.width * op->set.element;
    if (!usable_now(op->set.to, (op->set.height - 1) * op->set.pitch + bytes, "memset"))
        return false;
    for (size_t row = 0; row < op->set.height; row++) {
        char *to = (char *)op->set.to + row * op->set.pitch;
        if (op->set.element == 1)
            memset(to, (int)op->set.value, bytes);
        else
            for (size_t i = 0; i < bytes; i += op->set.element)
                memcpy(to + i, &op->set.value, op->set.element); /* little-endian */
    }
    return true;
}

static bool run_call(const Op *op) {
    in_host_function = op->work == HOST_FUNCTION;
    pthread_mutex_unlock(&lock);
    op->call.function(op->call.data);
    pthread_mutex_lock(&lock);
    in_host_function = false;
    return true;
}

static bool run_op(Stream *stream, const Op *op) {
    Block *block;
    switch (op->work) {
    case COPY:
        return run_copy(op);
    case SET:
        return run_set(op);
    case HOST_FUNCTION:
    case KERNEL:
        return run_call(op);
    case MARK:
        op->mark->clock = stream->clock;
        op->mark->done = true;
        return true;
    case WAIT:
        run_until(op->mark);
        if (op->mark->clock > stream->clock)
            stream->clock = op->mark->clock;
        return true;
    case ALLOCATE:
        block = block_at(op->block);
        if (block)
            block->state = LIVE;
        return true;
    case FREE:
        if (!usable_now(op->block, 0, "free"))
            return false;
        free_block(block_at(op->block));
        return true;
    default:
        return true;
    }
}

static void drop_op(Op *op) {
    if (op->work == COPY)
        free(op->copy.staged);
    if (op->work == MARK || op->work == WAIT)
        release_mark(op->mark);
    free(op);
}

bool runs_here(const Stream *stream) {
    return stream->running && pthread_equal(stream->runner, pthread_self());
}

/* Runs the oldest work of a stream, or waits while another thread does. */
void run_one(Stream *stream) {
    if (stream->running) {
        pthread_cond_wait(&something_ran, &lock);
        return;
    }
    Op *op = stream->head;
    stream->running = true;
    stream->runner = pthread_self();
    stream->references++;
    if (!run_op(stream, op))
        lose(stream);
    if (op->work != MARK && op->work != WAIT)
        stream->clock += cost_of_work;
    stream->head = op->next;
    if (!stream->head)
        stream->tail = NULL;
    stream->pending--;
    drop_op(op);
    stream->running = false;
    stream->references--;
    pthread_cond_broadcast(&something_ran);
    free_stream_if_unused(stream);
}

void run_until(Mark *mark) {
    mark->references++;
    while (!mark->done && mark->stream->head && !runs_here(mark->stream))
        run_one(mark->stream);
    release_mark(mark);
}

void drain(Stream *stream) {
    stream->references++;
    while (stream->head && !runs_here(stream))
        run_one(stream);
    stream->references--;
    free_stream_if_unused(stream);
}

void idle(Context *context) {
    bool found = true;
    while (found) {
        found = false;
        for (Stream *stream = streams; stream && !found; stream = stream->next)
            if (stream->context == context && stream->head && !runs_here(stream)) {
                drain(stream);
                found = true; /* the list may have changed */
            }
    }
}

void free_streams_of(Context *context) {
    for (Stream *next, *stream = streams; stream; stream = next) {
        next = stream->next;
        if (stream->context != context || stream->is_default)
            continue;
        if (stream->handle) {
            leave_capture(stream);
            free_handle(stream->handle);
            stream->handle = NULL;
        }
        free_stream_if_unused(stream);
    }
}

/* ---- enqueueing ---- */

void push(Stream *stream, const Op *op) {
    Op *copy = zeroed(sizeof *copy);
    *copy = *op;
    copy->next = NULL;
    if (copy->work == MARK || copy->work == WAIT)
        copy->mark->references++;
    if (stream->tail)
        stream->tail->next = copy;
    else
        stream->head = copy;
    stream->tail = copy;
    stream->pending++;
}

void push_wait(Stream *stream, Mark *mark) {
    if (mark && !mark->done && mark->stream != stream)
        push(stream, &(Op){.work = WAIT, .mark = mark});
}

Mark *mark_now(Stream *stream) {
    if (!stream->head)
        return NULL;
    Mark *mark = new_mark(stream);
    push(stream, &(Op){.work = MARK, .mark = mark});
    return mark;
}

/* The legacy stream waits for every blocking stream, and they wait for it. */
void order_with_legacy(Stream *stream) {
    if (stream->flags & NON_BLOCKING)
        return;
    Stream *legacy = legacy_of(stream->context);
    for (Stream *other = streams; other; other = other->next) {
        bool ordered = stream == legacy ? other != legacy && !(other->flags & NON_BLOCKING) : other == legacy;
        if (!ordered || other->context != stream->context || !other->head)
            continue;
        Mark *mark = mark_now(other);
        push_wait(stream, mark);
        release_mark(mark);
    }
}

CUresult enqueue(Stream *stream, const Op *op) {
    if (stream->capture)
        return capture_op(stream, op);
    order_with_legacy(stream);
    push(stream, op);
    if (machine.eager)
        drain(stream);
    while (stream->pending > MOST_PENDING && !runs_here(stream))
        run_one(stream);
    return SUCCESS;
}

/* ---- the interface of streams ---- */

static CUresult create_stream(void **handle, unsigned flags, int priority) {
    if (flags & ~1U)
        return INVALID_VALUE;
    priority = priority > 0 ? 0 : priority < -5 ? -5 : priority;
    Stream *stream = new_stream(current(), flags, priority);
    stream->handle = new_handle(STREAM, stream);
    *handle = stream->handle;
    return SUCCESS;
}

API CUresult cuStreamCreate(void **stream, unsigned flags) {
    ENTER_IN_CONTEXT("cuStreamCreate");
    return create_stream(stream, flags, 0);
}

API CUresult cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    ENTER_IN_CONTEXT("cuStreamCreateWithPriority");
    return create_stream(stream, flags, priority);
}

API CUresult cuStreamDestroy_v2(const void *handle) {
    ENTER("cuStreamDestroy");
    Stream *stream = object_of(handle, STREAM);
    if (!stream) {
        violation("cuStreamDestroy of %p, which does not exist", handle);
        return INVALID_HANDLE;
    }
    leave_capture(stream);
    free_handle(stream->handle);
    stream->handle = NULL; /* its work still runs */
    free_stream_if_unused(stream);
    return SUCCESS;
}

API CUresult cuStreamGetId(const void *handle, unsigned long long *id) {
    ENTER_IN_CONTEXT("cuStreamGetId");
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    *id = stream->id;
    return SUCCESS;
}

API CUresult cuStreamGetFlags(const void *handle, unsigned *flags) {
    ENTER_IN_CONTEXT("cuStreamGetFlags");
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    *flags = stream->flags;
    return SUCCESS;
}

API CUresult cuStreamGetPriority(const void *handle, int *priority) {
    ENTER_IN_CONTEXT("cuStreamGetPriority");
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    *priority = stream->is_default ? 0 : stream->priority;
    return SUCCESS;
}

API CUresult cuStreamGetCtx(const void *handle, void **context) {
    ENTER_IN_CONTEXT("cuStreamGetCtx");
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    *context = stream->context->handle;
    return SUCCESS;
}

API CUresult cuStreamGetDevice(const void *handle, CUdevice *device) {
    ENTER_IN_CONTEXT("cuStreamGetDevice");
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    *device = stream->context->device;
    return SUCCESS;
}

static CUresult waitable(const void *handle, Stream **stream) {
    CHECK(stream_of(handle, stream));
    if (!(*stream)->capture)
        return SUCCESS;
    invalidate((*stream)->capture);
    return CAPTURE_UNSUPPORTED;
}

/* A stream has done its work when the default stream that it waits for has, too. */
API CUresult cuStreamSynchronize(const void *handle) {
    ENTER_IN_CONTEXT("cuStreamSynchronize");
    Stream *stream;
    CHECK(waitable(handle, &stream));
    if (is_legacy(stream))
        order_with_legacy(stream);
    drain(stream);
    trim_pools();
    return current()->lost;
}

API CUresult cuStreamQuery(const void *handle) {
    ENTER_IN_CONTEXT("cuStreamQuery");
    Stream *stream;
    CHECK(waitable(handle, &stream));
    if (!stream->head)
        return SUCCESS;
    if (!runs_here(stream))
        run_one(stream); /* time goes by: whoever asks often enough sees the end */
    return NOT_READY;
}

API CUresult cuLaunchHostFunc(const void *handle, void (*function)(void *), void *data) {
    ENTER_IN_CONTEXT("cuLaunchHostFunc");
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    Op op = {.work = HOST_FUNCTION};
    op.call.function = function;
    op.call.data = data;
    return enqueue(stream, &op);
}

/* A kernel of a test: a function that runs in the order of the stream, and may be captured. */
API CUresult standin_kernel(const void *handle, void (*function)(void *), void *data) {
    ENTER_IN_CONTEXT("standin_kernel");
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    Op op = {.work = KERNEL};
    op.call.function = function;
    op.call.data = data;
    return enqueue(stream, &op);
}

/* Lets the work of a stream run, without a call of the driver that may fail. */
API void standin_drain(const void *handle) {
    pthread_mutex_lock(&lock);
    Stream *stream = NULL;
    if (current() && !stream_of(handle, &stream)) {
        if (is_legacy(stream))
            order_with_legacy(stream);
        drain(stream);
    }
    pthread_mutex_unlock(&lock);
}

/* The streams that exist, the newest first: writes as many as there is room for, and answers how many there are. */
API size_t standin_streams(void **handles, size_t room) {
    size_t count = 0;
    pthread_mutex_lock(&lock);
    for (Stream *stream = streams; stream; stream = stream->next)
        if (stream->handle) {
            if (count < room)
                handles[count] = stream->handle;
            count++;
        }
    pthread_mutex_unlock(&lock);
    return count;
}

/* Number of pieces of work that wait on a stream, marks and waits included. */
API size_t standin_pending(const void *handle) {
    pthread_mutex_lock(&lock);
    Stream *stream = object_of(handle, STREAM);
    size_t pending = stream ? stream->pending : 0;
    pthread_mutex_unlock(&lock);
    return pending;
}

/* ---- graphs that run ---- */

void launch_nodes(Stream *stream, Node *const *nodes, size_t count) {
    for (size_t i = 0; i < count; i++)
        push(stream, &nodes[i]->op);
    while (stream->pending > MOST_PENDING && !runs_here(stream))
        run_one(stream);
}

/* The streams of a capture go on outside of it. */
void leave_all(Capture *capture) {
    for (Stream *stream = streams; stream; stream = stream->next)
        if (stream->capture == capture) {
            stream->capture = NULL;
            set_tips(stream, NULL, 0);
            release_capture(capture);
        }
}
