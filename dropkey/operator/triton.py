def supported(q, k, v):
    return "not yet"
