/* Capture of streams, and graphs. */
#include "standin.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static Capture *captures; /* those that go on */
static uint64_t next_capture_id = 1;
static _Thread_local int thread_mode = GLOBAL_CAPTURE;

typedef struct Exec {
    Handle *handle;
    Node **order; /* copies, in the order in which they run */
    size_t count;
    uint64_t flags;
    Mark *last; /* behind the last launch, which the next one waits for */
    UserObject **objects;
    size_t object_count;
} Exec;

/* ---- graphs ---- */

static Graph *new_graph(void) {
    Graph *graph = zeroed(sizeof *graph);
    graph->handle = new_handle(GRAPH, graph);
    return graph;
}

static Node *add_node(Graph *graph, const Op *op, Node *const *dependencies, size_t count) {
    Node *node = zeroed(sizeof *node);
    node->op = *op;
    node->graph = graph;
    node->number = graph->count;
    node->count = count;
    node->dependencies = zeroed(count * sizeof *node->dependencies);
    if (count)
        memcpy(node->dependencies, dependencies, count * sizeof *dependencies);
    graph->nodes = realloc(graph->nodes, (graph->count + 1) * sizeof *graph->nodes);
    if (!graph->nodes)
        abort();
    graph->nodes[graph->count++] = node;
    return node;
}

static void release_object(UserObject *object, unsigned count) {
    object->references -= count < object->references ? count : object->references;
    if (object->references)
        return;
    free_handle(object->handle);
    pthread_mutex_unlock(&lock); /* it may take Python's lock */
    object->destroy(object->data);
    pthread_mutex_lock(&lock);
    free(object);
}

static UserObject **share_objects(UserObject **objects, size_t count) {
    UserObject **shared = zeroed(count * sizeof *shared);
    for (size_t i = 0; i < count; i++) {
        shared[i] = objects[i];
        shared[i]->references++;
    }
    return shared;
}

static void drop_objects(UserObject **objects, size_t count) {
    for (size_t i = 0; i < count; i++)
        release_object(objects[i], 1);
    free(objects);
}

static void free_graph(Graph *graph) {
    for (size_t i = 0; i < graph->count; i++) {
        if (graph->nodes[i]->op.work == CHILD)
            free_graph(graph->nodes[i]->op.child);
        free(graph->nodes[i]->dependencies);
        free(graph->nodes[i]);
    }
    free(graph->nodes);
    UserObject **objects = graph->objects;
    size_t count = graph->object_count;
    if (graph->handle)
        free_handle(graph->handle);
    free(graph);
    drop_objects(objects, count);
}

static Graph *copy_graph(const Graph *graph) {
    Graph *copy = zeroed(sizeof *copy);
    for (size_t i = 0; i < graph->count; i++) {
        const Node *node = graph->nodes[i];
        Node *made = add_node(copy, &node->op, NULL, 0);
        free(made->dependencies);
        made->count = node->count;
        made->dependencies = zeroed(node->count * sizeof *made->dependencies);
        for (size_t j = 0; j < node->count; j++)
            made->dependencies[j] = copy->nodes[node->dependencies[j]->number];
        if (made->op.work == CHILD)
            made->op.child = copy_graph(node->op.child);
    }
    copy->objects = share_objects(graph->objects, graph->object_count);
    copy->object_count = graph->object_count;
    return copy;
}

static CUresult graph_of(const void *handle, Graph **graph) {
    *graph = object_of(handle, GRAPH);
    return *graph ? SUCCESS : INVALID_VALUE;
}

API CUresult cuGraphCreate(void **handle, unsigned flags) {
    ENTER("cuGraphCreate");
    if (flags)
        return INVALID_VALUE;
    *handle = new_graph()->handle;
    return SUCCESS;
}

API CUresult cuGraphDestroy(const void *handle) {
    ENTER("cuGraphDestroy");
    Graph *graph;
    CHECK(graph_of(handle, &graph));
    if (graph->capturing) {
        violation("cuGraphDestroy of a graph that is being captured");
        return INVALID_VALUE;
    }
    free_graph(graph);
    return SUCCESS;
}

API CUresult cuGraphClone(void **copy, const void *handle) {
    ENTER("cuGraphClone");
    Graph *graph;
    CHECK(graph_of(handle, &graph));
    Graph *made = copy_graph(graph);
    made->handle = new_handle(GRAPH, made);
    *copy = made->handle;
    return SUCCESS;
}

API CUresult cuGraphNodeFindInClone(Node **found, const Node *node, const void *handle) {
    ENTER("cuGraphNodeFindInClone");
    Graph *graph;
    CHECK(graph_of(handle, &graph));
    if (node->number >= graph->count)
        return INVALID_VALUE;
    *found = graph->nodes[node->number];
    return SUCCESS;
}

API CUresult cuGraphGetNodes(const void *handle, Node **nodes, size_t *count) {
    ENTER("cuGraphGetNodes");
    Graph *graph;
    CHECK(graph_of(handle, &graph));
    if (!nodes) {
        *count = graph->count;
        return SUCCESS;
    }
    for (size_t i = 0; i < *count; i++)
        nodes[i] = i < graph->count ? graph->nodes[i] : NULL;
    *count = *count < graph->count ? *count : graph->count;
    return SUCCESS;
}

API CUresult cuGraphGetRootNodes(const void *handle, Node **nodes, size_t *count) {
    ENTER("cuGraphGetRootNodes");
    Graph *graph;
    CHECK(graph_of(handle, &graph));
    size_t found = 0;
    for (size_t i = 0; i < graph->count; i++)
        if (!graph->nodes[i]->count && (!nodes || found < *count)) {
            if (nodes)
                nodes[found] = graph->nodes[i];
            found++;
        }
    *count = found;
    return SUCCESS;
}

static CUresult edges_of(const void *handle, Node **from, Node **to, void *data, size_t *count) {
    Graph *graph;
    CHECK(graph_of(handle, &graph));
    size_t found = 0;
    for (size_t i = 0; i < graph->count; i++)
        for (size_t j = 0; j < graph->nodes[i]->count; j++, found++)
            if (from && found < *count) {
                from[found] = graph->nodes[i]->dependencies[j];
                to[found] = graph->nodes[i];
                if (data)
                    memset((char *)data + 8 * found, 0, 8);
            }
    if (!from || found < *count)
        *count = found;
    return SUCCESS;
}

API CUresult cuGraphGetEdges(const void *graph, Node **from, Node **to, size_t *count) {
    ENTER("cuGraphGetEdges");
    return edges_of(graph, from, to, NULL, count);
}

API CUresult cuGraphGetEdges_v2(const void *graph, Node **from, Node **to, void *data, size_t *count) {
    ENTER("cuGraphGetEdges");
    return edges_of(graph, from, to, data, count);
}

API CUresult cuGraphNodeGetType(const Node *node, int *type) {
    ENTER("cuGraphNodeGetType");
    switch (node->op.work) {
    case COPY:
        *type = 1;
        break;
    case SET:
        *type = 2;
        break;
    case HOST_FUNCTION:
        *type = 3;
        break;
    case CHILD:
        *type = 4;
        break;
    case KERNEL:
        *type = 0;
        break;
    default:
        *type = 5; /* empty */
    }
    return SUCCESS;
}

API CUresult cuGraphAddEmptyNode(Node **made, const void *handle, Node *const *dependencies, size_t count) {
    ENTER("cuGraphAddEmptyNode");
    Graph *graph;
    CHECK(graph_of(handle, &graph));
    *made = add_node(graph, &(Op){.work = EMPTY}, dependencies, count);
    return SUCCESS;
}

typedef struct HostParameters {
    void (*function)(void *);
    void *data;
} HostParameters;

API CUresult cuGraphAddHostNode(Node **made, const void *handle, Node *const *dependencies, size_t count,
                                const HostParameters *parameters) {
    ENTER("cuGraphAddHostNode");
    Graph *graph;
    CHECK(graph_of(handle, &graph));
    Op op = {.work = HOST_FUNCTION};
    op.call.function = parameters->function;
    op.call.data = parameters->data;
    *made = add_node(graph, &op, dependencies, count);
    return SUCCESS;
}

API CUresult cuGraphAddChildGraphNode(Node **made, const void *handle, Node *const *dependencies, size_t count,
                                      const void *child_handle) {
    ENTER("cuGraphAddChildGraphNode");
    Graph *graph, *child;
    CHECK(graph_of(handle, &graph));
    CHECK(graph_of(child_handle, &child));
    *made = add_node(graph, &(Op){.work = CHILD, .child = copy_graph(child)}, dependencies, count);
    return SUCCESS;
}

API CUresult cuGraphChildGraphNodeGetGraph(const Node *node, void **handle) {
    ENTER("cuGraphChildGraphNodeGetGraph");
    if (node->op.work != CHILD)
        return INVALID_VALUE;
    Graph *child = node->op.child;
    if (!child->handle)
        child->handle = new_handle(GRAPH, child);
    *handle = child->handle;
    return SUCCESS;
}

API CUresult cuGraphDebugDotPrint(const void *handle, const char *path, unsigned flags) {
    ENTER("cuGraphDebugDotPrint");
    (void)flags;
    Graph *graph;
    CHECK(graph_of(handle, &graph));
    FILE *file = fopen(path, "w");
    if (!file)
        return NOT_PERMITTED;
    fprintf(file, "digraph graph_0 {\n");
    for (size_t i = 0; i < graph->count; i++) {
        fprintf(file, "node_%zu\n", i);
        for (size_t j = 0; j < graph->nodes[i]->count; j++)
            fprintf(file, "node_%zu -> node_%zu\n", graph->nodes[i]->dependencies[j]->number, i);
    }
    fprintf(file, "}\n");
    fclose(file);
    return SUCCESS;
}

/* ---- objects that live as long as a graph ---- */

API CUresult cuUserObjectCreate(void **handle, void *data, void (*destroy)(void *), unsigned references,
                                unsigned flags) {
    ENTER("cuUserObjectCreate");
    (void)flags;
    UserObject *object = zeroed(sizeof *object);
    *object = (UserObject){new_handle(USER_OBJECT, object), destroy, data, references};
    *handle = object->handle;
    return SUCCESS;
}

API CUresult cuUserObjectRetain(const void *handle, unsigned count) {
    ENTER("cuUserObjectRetain");
    UserObject *object = object_of(handle, USER_OBJECT);
    if (!object)
        return INVALID_VALUE;
    object->references += count;
    return SUCCESS;
}

API CUresult cuUserObjectRelease(const void *handle, unsigned count) {
    ENTER("cuUserObjectRelease");
    UserObject *object = object_of(handle, USER_OBJECT);
    if (!object)
        return INVALID_VALUE;
    release_object(object, count);
    return SUCCESS;
}

API CUresult cuGraphRetainUserObject(const void *handle, const void *object_handle, unsigned count, unsigned flags) {
    ENTER("cuGraphRetainUserObject");
    Graph *graph;
    CHECK(graph_of(handle, &graph));
    UserObject *object = object_of(object_handle, USER_OBJECT);
    if (!object)
        return INVALID_VALUE;
    if (!(flags & 1)) /* not moved: the caller keeps its own */
        object->references += count;
    graph->objects = realloc(graph->objects, (graph->object_count + count) * sizeof *graph->objects);
    if (!graph->objects)
        abort();
    for (unsigned i = 0; i < count; i++)
        graph->objects[graph->object_count++] = object;
    return SUCCESS;
}

API CUresult cuGraphReleaseUserObject(const void *handle, const void *object_handle, unsigned count) {
    ENTER("cuGraphReleaseUserObject");
    Graph *graph;
    CHECK(graph_of(handle, &graph));
    UserObject *object = object_of(object_handle, USER_OBJECT);
    for (size_t i = graph->object_count; object && count && i-- > 0;)
        if (graph->objects[i] == object) {
            graph->objects[i] = graph->objects[--graph->object_count];
            count--;
            release_object(object, 1);
        }
    return count ? INVALID_VALUE : SUCCESS;
}

/* ---- graphs that can be launched ---- */

static void append(Exec *exec, const Op *op) {
    Node *node = zeroed(sizeof *node);
    node->op = *op;
    exec->order = realloc(exec->order, (exec->count + 1) * sizeof *exec->order);
    if (!exec->order)
        abort();
    exec->order[exec->count++] = node;
}

/* Of the nodes that may run, the one that was added last comes first: an edge that is missing gives wrong data. */
static void order_nodes(Exec *exec, const Graph *graph) {
    bool *done = zeroed(graph->count);
    for (size_t step = 0; step < graph->count; step++)
        for (size_t i = graph->count; i-- > 0;) {
            const Node *node = graph->nodes[i];
            bool ready = !done[i];
            for (size_t j = 0; ready && j < node->count; j++)
                ready = done[node->dependencies[j]->number];
            if (!ready)
                continue;
            done[i] = true;
            if (node->op.work == CHILD)
                order_nodes(exec, node->op.child);
            else if (node->op.work != EMPTY)
                append(exec, &node->op);
            break;
        }
    free(done);
}

static void fill_exec(Exec *exec, Graph *graph) {
    order_nodes(exec, graph);
    exec->objects = share_objects(graph->objects, graph->object_count);
    exec->object_count = graph->object_count;
}

static void empty_exec(Exec *exec) {
    for (size_t i = 0; i < exec->count; i++)
        free(exec->order[i]);
    free(exec->order);
    UserObject **objects = exec->objects;
    size_t count = exec->object_count;
    exec->order = NULL;
    exec->objects = NULL;
    exec->count = exec->object_count = 0;
    drop_objects(objects, count);
}

static CUresult instantiate(void **handle, const void *graph_handle, uint64_t flags) {
    Graph *graph;
    CHECK(graph_of(graph_handle, &graph));
    if (graph->capturing)
        return INVALID_VALUE;
    Exec *exec = zeroed(sizeof *exec);
    exec->handle = new_handle(EXEC, exec);
    exec->flags = flags;
    fill_exec(exec, graph);
    *handle = exec->handle;
    return SUCCESS;
}

API CUresult cuGraphInstantiateWithFlags(void **handle, const void *graph, unsigned long long flags) {
    ENTER("cuGraphInstantiate");
    return instantiate(handle, graph, flags);
}

typedef struct InstantiateParameters {
    uint64_t flags;
    const void *stream;
    Node *failed;
    int result;
} InstantiateParameters;

API CUresult cuGraphInstantiateWithParams(void **handle, const void *graph, InstantiateParameters *parameters) {
    ENTER("cuGraphInstantiateWithParams");
    parameters->failed = NULL;
    parameters->result = 0;
    return instantiate(handle, graph, parameters->flags);
}

API CUresult cuGraphExecGetFlags(const void *handle, uint64_t *flags) {
    ENTER("cuGraphExecGetFlags");
    Exec *exec = object_of(handle, EXEC);
    if (!exec)
        return INVALID_VALUE;
    *flags = exec->flags;
    return SUCCESS;
}

typedef struct UpdateResult {
    int result;
    Node *node, *from;
} UpdateResult;

API CUresult cuGraphExecUpdate_v2(const void *handle, const void *graph_handle, UpdateResult *result) {
    ENTER("cuGraphExecUpdate");
    Exec *exec = object_of(handle, EXEC);
    Graph *graph;
    CHECK(graph_of(graph_handle, &graph));
    if (!exec)
        return INVALID_VALUE;
    Exec wanted = {0};
    order_nodes(&wanted, graph);
    bool same = wanted.count == exec->count;
    for (size_t i = 0; same && i < wanted.count; i++)
        same = wanted.order[i]->op.work == exec->order[i]->op.work;
    empty_exec(&wanted);
    *result = (UpdateResult){same ? 0 : 2, NULL, NULL}; /* 2: the topology changed */
    if (!same)
        return 910; /* CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE */
    empty_exec(exec);
    fill_exec(exec, graph);
    return SUCCESS;
}

API CUresult cuGraphExecDestroy(const void *handle) {
    ENTER("cuGraphExecDestroy");
    Exec *exec = object_of(handle, EXEC);
    if (!exec) {
        violation("cuGraphExecDestroy of %p, which does not exist", handle);
        return INVALID_VALUE;
    }
    release_mark(exec->last); /* work that was launched still runs */
    free_handle(exec->handle);
    empty_exec(exec);
    free(exec);
    return SUCCESS;
}

API CUresult cuGraphUpload(const void *handle, const void *stream_handle) {
    ENTER_IN_CONTEXT("cuGraphUpload");
    Stream *stream;
    CHECK(stream_of(stream_handle, &stream));
    return object_of(handle, EXEC) ? SUCCESS : INVALID_VALUE;
}

API CUresult cuGraphLaunch(const void *handle, const void *stream_handle) {
    ENTER_IN_CONTEXT("cuGraphLaunch");
    Exec *exec = object_of(handle, EXEC);
    Stream *stream;
    CHECK(stream_of(stream_handle, &stream));
    if (!exec) {
        violation("cuGraphLaunch of %p, which does not exist", handle);
        return INVALID_VALUE;
    }
    if (stream->capture) {
        for (size_t i = 0; i < exec->count; i++)
            CHECK(capture_op(stream, &exec->order[i]->op));
        return SUCCESS;
    }
    CHECK(enqueue(stream, &(Op){.work = EMPTY}));
    if (exec->last && !exec->last->done && exec->last->stream != stream)
        CHECK(enqueue(stream, &(Op){.work = WAIT, .mark = exec->last}));
    launch_nodes(stream, exec->order, exec->count);
    release_mark(exec->last);
    exec->last = mark_now(stream);
    if (machine.eager)
        drain(stream);
    return SUCCESS;
}

/* ---- capture ---- */

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
