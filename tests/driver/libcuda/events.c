/* Events: places in the queues of streams, or in a capture. */
#include "standin.h"

#include <stdlib.h>
#include <string.h>

#define DISABLE_TIMING 2

typedef struct Event {
    Handle *handle;
    unsigned flags;
    Context *context;
    Mark *mark; /* NULL: nothing to wait for */
    bool recorded;
    Capture *capture; /* last recorded in this capture; NULL for none */
    Node **tips;
    size_t tip_count;
} Event;

static CUresult event_of(const void *handle, Event **event) {
    *event = object_of(handle, EVENT);
    if (*event)
        return SUCCESS;
    violation("event %p does not exist", handle);
    return INVALID_HANDLE;
}

static void forget_record(Event *event) {
    release_mark(event->mark);
    if (event->capture)
        release_capture(event->capture);
    free(event->tips);
    event->mark = NULL;
    event->capture = NULL;
    event->tips = NULL;
    event->tip_count = 0;
}

API CUresult cuEventCreate(void **handle, unsigned flags) {
    ENTER_IN_CONTEXT("cuEventCreate");
    if (flags & ~7U)
        return INVALID_VALUE;
    Event *event = zeroed(sizeof *event);
    *event = (Event){.handle = new_handle(EVENT, event), .flags = flags, .context = current()};
    *handle = event->handle;
    return SUCCESS;
}

API CUresult cuEventDestroy_v2(const void *handle) {
    ENTER("cuEventDestroy");
    Event *event;
    CHECK(event_of(handle, &event));
    forget_record(event);
    free_handle(event->handle);
    free(event);
    return SUCCESS;
}

static CUresult record(const void *handle, const void *stream_handle) {
    Event *event;
    Stream *stream;
    CHECK(event_of(handle, &event));
    CHECK(stream_of(stream_handle, &stream));
    if (event->context != stream->context)
        return INVALID_HANDLE;
    if (stream->capture && stream->capture->invalidated)
        return CAPTURE_INVALIDATED;
    forget_record(event);
    event->recorded = true;
    if (stream->capture) {
        event->capture = stream->capture;
        event->capture->references++;
        event->tip_count = stream->tip_count;
        event->tips = zeroed(stream->tip_count * sizeof *event->tips);
        memcpy(event->tips, stream->tips, stream->tip_count * sizeof *event->tips);
        return SUCCESS;
    }
    order_with_legacy(stream);
    event->mark = new_mark(stream);
    push(stream, &(Op){.work = MARK, .mark = event->mark});
    if (stream->pending == 1 || machine.eager)
        drain(stream); /* nothing is before it */
    return SUCCESS;
}

API CUresult cuEventRecord(const void *event, const void *stream) {
    ENTER_IN_CONTEXT("cuEventRecord");
    return record(event, stream);
}

API CUresult cuEventRecordWithFlags(const void *event, const void *stream, unsigned flags) {
    ENTER_IN_CONTEXT("cuEventRecordWithFlags");
    return flags ? NOT_SUPPORTED : record(event, stream);
}

API CUresult cuStreamWaitEvent(const void *stream_handle, const void *handle, unsigned flags) {
    ENTER_IN_CONTEXT("cuStreamWaitEvent");
    Event *event;
    Stream *stream;
    CHECK(event_of(handle, &event));
    CHECK(stream_of(stream_handle, &stream));
    if (flags > 1)
        return INVALID_VALUE;
    if (stream->capture && stream->capture->invalidated)
        return CAPTURE_INVALIDATED;
    if (event->capture) {
        if (!event->capture->active)
            return CAPTURED_EVENT;
        if (event->capture->invalidated)
            return CAPTURE_INVALIDATED;
        if (is_legacy(stream)) {
            invalidate(event->capture);
            return CAPTURE_IMPLICIT;
        }
        if (stream->capture && stream->capture != event->capture) {
            invalidate(stream->capture);
            invalidate(event->capture);
            return CAPTURE_MERGE;
        }
        join_capture(stream, event->capture);
        add_tips(stream, event->tips, event->tip_count);
        return SUCCESS;
    }
    if (stream->capture) {
        if (!event->recorded)
            return SUCCESS;
        invalidate(stream->capture);
        return CAPTURE_ISOLATION;
    }
    order_with_legacy(stream);
    push_wait(stream, event->mark);
    if (machine.eager)
        drain(stream);
    return SUCCESS;
}

static CUresult waitable_event(const void *handle, Event **event) {
    CHECK(event_of(handle, event));
    if (!(*event)->capture)
        return SUCCESS;
    if ((*event)->capture->active)
        invalidate((*event)->capture);
    return CAPTURED_EVENT;
}

API CUresult cuEventSynchronize(const void *handle) {
    ENTER_IN_CONTEXT("cuEventSynchronize");
    Event *event;
    CHECK(waitable_event(handle, &event));
    if (event->mark)
        run_until(event->mark);
    trim_pools();
    return event->context->lost;
}

API CUresult cuEventQuery(const void *handle) {
    ENTER_IN_CONTEXT("cuEventQuery");
    CHECK(safe_during_capture());
    Event *event;
    CHECK(waitable_event(handle, &event));
    if (!event->mark || event->mark->done)
        return SUCCESS;
    if (!runs_here(event->mark->stream))
        run_one(event->mark->stream);
    return NOT_READY;
}

static CUresult elapsed(float *milliseconds, const void *from_handle, const void *to_handle) {
    Event *from, *to;
    CHECK(waitable_event(from_handle, &from));
    CHECK(waitable_event(to_handle, &to));
    if ((from->flags | to->flags) & DISABLE_TIMING || !from->mark || !to->mark)
        return INVALID_HANDLE;
    if (!from->mark->done || !to->mark->done)
        return NOT_READY;
    *milliseconds = (float)((to->mark->clock - from->mark->clock) / 1000);
    return SUCCESS;
}

API CUresult cuEventElapsedTime(float *milliseconds, const void *from, const void *to) {
    ENTER_IN_CONTEXT("cuEventElapsedTime");
    return elapsed(milliseconds, from, to);
}

API CUresult cuEventElapsedTime_v2(float *milliseconds, const void *from, const void *to) {
    ENTER_IN_CONTEXT("cuEventElapsedTime");
    return elapsed(milliseconds, from, to);
}
