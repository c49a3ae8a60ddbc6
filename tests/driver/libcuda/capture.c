/* Capture of streams. */
#include "standin.h"

#include <stdlib.h>
#include <string.h>

static Capture *captures; /* those that go on */
static uint64_t next_capture_id = 1;
static _Thread_local int thread_mode = GLOBAL_CAPTURE;

void invalidate(Capture *capture) { capture->invalidated = true; }

void release_capture(Capture *capture) {
    if (--capture->references == 0)
        free(capture);
}

void set_tips(Stream *stream, Node *const *nodes, size_t count) {
    Node **tips = zeroed(count * sizeof *tips);
    if (count)
        memcpy(tips, nodes, count * sizeof *tips);
    free(stream->tips);
    stream->tips = tips;
    stream->tip_count = count;
}

void add_tips(Stream *stream, Node *const *nodes, size_t count) {
    for (size_t i = 0; i < count; i++) {
        bool known = false;
        for (size_t j = 0; j < stream->tip_count; j++)
            known = known || stream->tips[j] == nodes[i];
        if (known)
            continue;
        stream->tips = realloc(stream->tips, (stream->tip_count + 1) * sizeof *stream->tips);
        if (!stream->tips)
            abort();
        stream->tips[stream->tip_count++] = nodes[i];
    }
}

void join_capture(Stream *stream, Capture *capture) {
    if (stream->capture)
        return;
    stream->capture = capture;
    capture->references++;
    /* Work that is enqueued already stays outside. */
}

CUresult capture_op(Stream *stream, const Op *op) {
    Capture *capture = stream->capture;
    if (capture->invalidated)
        return CAPTURE_INVALIDATED;
    Node *node = add_node(capture->graph, op, stream->tips, stream->tip_count);
    set_tips(stream, &node, 1);
    return SUCCESS;
}

CUresult safe_during_capture(void) {
    bool refused = false;
    for (Capture *capture = captures; capture; capture = capture->next) {
        bool here = pthread_equal(capture->thread, pthread_self()) && capture->mode != RELAXED_CAPTURE;
        bool anywhere = thread_mode == GLOBAL_CAPTURE && capture->mode == GLOBAL_CAPTURE;
        if (thread_mode != RELAXED_CAPTURE && (here || anywhere)) {
            invalidate(capture);
            refused = true;
        }
    }
    return refused ? CAPTURE_UNSUPPORTED : SUCCESS;
}

/* Nobody may wait for a context while one of its streams captures, in any mode. */
CUresult no_capture_in(Context *context) {
    bool refused = false;
    for (Capture *capture = captures; capture; capture = capture->next)
        if (capture->origin->context == context) {
            invalidate(capture);
            refused = true;
        }
    return refused ? CAPTURE_UNSUPPORTED : SUCCESS;
}

/* The legacy stream would wait for a blocking stream that captures. */
CUresult no_implicit_wait(Context *context) {
    bool refused = false;
    for (Capture *capture = captures; capture; capture = capture->next)
        if (capture->origin->context == context && !(capture->origin->flags & 1)) {
            invalidate(capture);
            refused = true;
        }
    return refused ? CAPTURE_IMPLICIT : SUCCESS;
}

static CUresult begin(const void *handle, Graph *graph, Node *const *nodes, size_t count, int mode) {
    Stream *stream;
    if ((uintptr_t)handle < 2)
        return CAPTURE_UNSUPPORTED;
    CHECK(stream_of(handle, &stream));
    if (stream->capture || mode < GLOBAL_CAPTURE || mode > RELAXED_CAPTURE)
        return INVALID_VALUE;
    Capture *capture = zeroed(sizeof *capture);
    *capture = (Capture){.references = 1, .graph = graph ? graph : new_graph(), .own_graph = !graph, .active = true,
                         .mode = mode, .thread = pthread_self(), .origin = stream, .id = next_capture_id++,
                         .next = captures};
    capture->graph->capturing = true;
    captures = capture;
    stream->capture = capture;
    set_tips(stream, nodes, count);
    return SUCCESS;
}

API CUresult cuStreamBeginCapture_v2(const void *stream, int mode) {
    ENTER_IN_CONTEXT("cuStreamBeginCapture");
    return begin(stream, NULL, NULL, 0, mode);
}

API CUresult cuStreamBeginCaptureToGraph(const void *stream, const void *handle, Node *const *nodes, const void *data,
                                         size_t count, int mode) {
    ENTER_IN_CONTEXT("cuStreamBeginCaptureToGraph");
    (void)data;
    Graph *graph;
    CHECK(graph_of(handle, &graph));
    return begin(stream, graph, nodes, count, mode);
}

static bool is_joined(const Capture *capture) {
    const Graph *graph = capture->graph;
    const Stream *origin = capture->origin;
    bool *leads_on = zeroed(graph->count);
    for (size_t i = 0; i < graph->count; i++)
        for (size_t j = 0; j < graph->nodes[i]->count; j++)
            leads_on[graph->nodes[i]->dependencies[j]->number] = true;
    for (size_t i = 0; i < origin->tip_count; i++)
        leads_on[origin->tips[i]->number] = true;
    bool joined = true;
    for (size_t i = 0; i < graph->count; i++)
        joined = joined && leads_on[i];
    free(leads_on);
    return joined;
}

static void end(Capture *capture) {
    capture->active = false;
    capture->graph->capturing = false;
    for (Capture **place = &captures; *place; place = &(*place)->next)
        if (*place == capture) {
            *place = capture->next;
            break;
        }
}

API CUresult cuStreamEndCapture(const void *handle, void **graph) {
    ENTER_IN_CONTEXT("cuStreamEndCapture");
    *graph = NULL;
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    Capture *capture = stream->capture;
    if (!capture)
        return INVALID_VALUE;
    if (capture->origin != stream) {
        invalidate(capture);
        return CAPTURE_UNMATCHED;
    }
    if (capture->mode != RELAXED_CAPTURE && !pthread_equal(capture->thread, pthread_self()))
        return CAPTURE_WRONG_THREAD;
    CUresult result = capture->invalidated ? CAPTURE_INVALIDATED : is_joined(capture) ? SUCCESS : CAPTURE_UNJOINED;
    end(capture);
    if (!result)
        *graph = capture->graph->handle;
    else if (capture->own_graph)
        free_graph(capture->graph);
    capture->graph = NULL;
    capture->references++;
    leave_all(capture);
    release_capture(capture);
    return result;
}

/* A stream that is destroyed while it captures. */
void leave_capture(Stream *stream) {
    Capture *capture = stream->capture;
    if (!capture)
        return;
    if (capture->origin == stream && capture->active) {
        end(capture);
        if (capture->own_graph)
            free_graph(capture->graph);
        capture->graph = NULL;
        capture->references++;
        leave_all(capture);
        release_capture(capture);
        return;
    }
    stream->capture = NULL; /* work of it that is not joined makes the capture fail at its end */
    set_tips(stream, NULL, 0);
    release_capture(capture);
}

API CUresult cuStreamIsCapturing(const void *handle, int *status) {
    ENTER_IN_CONTEXT("cuStreamIsCapturing");
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    *status = !stream->capture ? 0 : stream->capture->invalidated ? 2 : 1;
    return SUCCESS;
}

static CUresult capture_info(const void *handle, int *status, uint64_t *id, void **graph, Node *const **nodes,
                             const void **data, size_t *count) {
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    Capture *capture = stream->capture;
    *status = !capture ? 0 : capture->invalidated ? 2 : 1;
    if (*status != 1)
        return SUCCESS;
    if (id)
        *id = capture->id;
    if (graph)
        *graph = capture->graph->handle;
    if (nodes)
        *nodes = stream->tips;
    if (data)
        *data = NULL;
    if (count)
        *count = stream->tip_count;
    return SUCCESS;
}

API CUresult cuStreamGetCaptureInfo(const void *stream, int *status, uint64_t *id) {
    ENTER_IN_CONTEXT("cuStreamGetCaptureInfo");
    return capture_info(stream, status, id, NULL, NULL, NULL, NULL);
}

API CUresult cuStreamGetCaptureInfo_v2(const void *stream, int *status, uint64_t *id, void **graph,
                                       Node *const **nodes, size_t *count) {
    ENTER_IN_CONTEXT("cuStreamGetCaptureInfo");
    return capture_info(stream, status, id, graph, nodes, NULL, count);
}

API CUresult cuStreamGetCaptureInfo_v3(const void *stream, int *status, uint64_t *id, void **graph,
                                       Node *const **nodes, const void **data, size_t *count) {
    ENTER_IN_CONTEXT("cuStreamGetCaptureInfo");
    return capture_info(stream, status, id, graph, nodes, data, count);
}

static CUresult update_dependencies(const void *handle, Node *const *nodes, size_t count, unsigned flags) {
    Stream *stream;
    CHECK(stream_of(handle, &stream));
    if (!stream->capture)
        return 401; /* CUDA_ERROR_ILLEGAL_STATE */
    if (flags & 1)
        set_tips(stream, nodes, count);
    else
        add_tips(stream, nodes, count);
    return SUCCESS;
}

API CUresult cuStreamUpdateCaptureDependencies(const void *stream, Node *const *nodes, size_t count, unsigned flags) {
    ENTER_IN_CONTEXT("cuStreamUpdateCaptureDependencies");
    return update_dependencies(stream, nodes, count, flags);
}

API CUresult cuStreamUpdateCaptureDependencies_v2(const void *stream, Node *const *nodes, const void *data,
                                                  size_t count, unsigned flags) {
    ENTER_IN_CONTEXT("cuStreamUpdateCaptureDependencies");
    (void)data;
    return update_dependencies(stream, nodes, count, flags);
}

API CUresult cuThreadExchangeStreamCaptureMode(int *mode) {
    ENTER("cuThreadExchangeStreamCaptureMode");
    int old = thread_mode;
    thread_mode = *mode;
    *mode = old;
    return SUCCESS;
}

/* What a library does to a capture that it cannot take part in. */
API void standin_invalidate(const void *handle) {
    pthread_mutex_lock(&lock);
    Stream *stream = object_of(handle, STREAM);
    if (stream && stream->capture)
        invalidate(stream->capture);
    pthread_mutex_unlock(&lock);
}

API int standin_is_capturing(const void *handle) {
    pthread_mutex_lock(&lock);
    Stream *stream = object_of(handle, STREAM);
    int capturing = stream && stream->capture;
    pthread_mutex_unlock(&lock);
    return capturing;
}
