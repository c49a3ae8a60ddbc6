/* Graphs, and those that can be launched. */
#include "standin.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

Graph *new_graph(void) {
    Graph *graph = zeroed(sizeof *graph);
    graph->handle = new_handle(GRAPH, graph);
    return graph;
}

Node *add_node(Graph *graph, const Op *op, Node *const *dependencies, size_t count) {
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

void free_graph(Graph *graph) {
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

CUresult graph_of(const void *handle, Graph **graph) {
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
