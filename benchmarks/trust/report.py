"""Stub."""
from pathlib import Path
def write(content, folder, preset):
    import collections, statistics
    by=collections.defaultdict(lambda: collections.defaultdict(list))
    for c in content["cells"]:
        k=(c["setting"],c["meta"],c["row"])
        by[k][str({a:b for a,b in c["recipe"].items()})].append(c)
    for k,v in by.items():
        best=max(v.values(), key=lambda cs: statistics.mean(c["validation"] for c in cs))
        print(k, len(v), round(statistics.mean(c["validation"] for c in best),1), [c["test"] for c in best], [c["seconds"] for c in best][:1])
    return []
