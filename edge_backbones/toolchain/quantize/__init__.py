"""Write the typed graph of a precision: `typed_graph` is the entry; `placement`, `qdq` and `half` are its parts."""
