import json, sys, time, os, itertools
import torch
from moerunner.bench import experts as be
from moerunner.bench.shapes import SHAPES, Shape, floor_seconds, peaks_of
from moerunner.bench.timing import graph_seconds
from moerunner.kernels import experts as ke, hopper
from moerunner.kernels import tiles as tc
from moerunner.kernels.order import order_slots
from moerunner.kernels.tiles import Specialised, Grouped, Product
from moerunner.values import TopK
out = sys.argv[2]; rows = []
def save(r):
    rows.append(r); print(json.dumps(r), flush=True)
    json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, open(out, "w"), indent=0)
def call(x, ids, wt, w13, w2, b13=None, b2=None, layout=0, act=(0,1.0,0.0,None,False,None,None), iw=False, output=2, tiles=None):
    return ke.run(x, ids, wt, w13, w2, b13, b2, layout, *act, iw, output, 1.0, tiles)
if sys.argv[1] == "check":
    g = torch.Generator().manual_seed(1)
    acts = [(0,1.0,0.0,None,False,None,None),(0,1.702,1.0,7.0,False,None,None),(2,1.0,0.0,None,False,None,None),(1,1.0,0.0,1.0,True,None,None),(4,1.0,0.0,None,False,None,None),(0,1.0,0.0,None,False,5.0,4.0)]
    n = 0
    for dtype, layout, bias, (E,K,H,I,T) in itertools.product((torch.bfloat16, torch.float16), (0,1,2), (False, True), ((8,2,256,128,300),(5,3,200,136,70),(64,6,512,264,900),(3,1,64,64,1),(16,4,2688,1856,500))):
        act = acts[n % len(acts)]; iw = (not bias) and n % 3 == 0; o = n % 3; n += 1
        d = lambda *s, sc=1.0: torch.empty(*s, device="cuda", dtype=dtype).normal_(std=sc)
        w13, w2 = d(E, I if layout == 2 else 2*I, H, sc=H**-.5), d(E, H, I, sc=I**-.5)
        b13, b2 = (d(*w13.shape[:2]), d(E, H)) if bias else (None, None)
        x = d(T, H); ids = torch.rand(T, E, generator=g).topk(K).indices
        ids[torch.rand(T, K, generator=g) < 0.1] = -1
        ids = ids.cuda(); wt = torch.rand(T, K, generator=g).cuda()
        a = (x, ids, wt, w13, w2, b13, b2, layout, act, iw, o)
        got = call(*a, tiles=Specialised()); got2 = call(*a, tiles=Specialised(3, 3)); want = call(*a)
        torch.cuda.synchronize()
        e = ((got.double()-want.double()).abs().max()/want.double().abs().max()).item()
        save(dict(kind="check", dtype=str(dtype), layout=layout, bias=bias, shape=(E,K,H,I,T), act=act, iw=iw, output=o, error=e, same=bool(torch.equal(got, got2)), finite=bool(torch.isfinite(got).all())))
    bad = [r for r in rows if not r["error"] < 2e-2 or not r["same"]]
    save(dict(kind="summary", bad=len(bad), of=n))
else:
    torch.manual_seed(0)
    peaks = peaks_of(torch.cuda.get_device_name())
    for name in sys.argv[3].split(","):
        shape = SHAPES.get(name) or Shape(*map(int, name.split("x")))
        gen = torch.Generator().manual_seed(0)
        size = 3*shape.experts*shape.hidden*shape.inter*2
        copies = be.make_weights(shape, max(2, min(8, -(-be._CACHE_BYTES//size))), torch.bfloat16, "cuda")
        for tokens in map(int, sys.argv[4].split(",")):
            inputs = []
            for r in range(8 if tokens <= 1024 else 4):
                ids = be.draw_ids(tokens, shape, "uniform", gen).cuda(); wt = torch.rand(tokens, shape.top_k, generator=gen).cuda()
                inputs.append((torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.bfloat16), ids, wt, copies[r % len(copies)]))
            floor = floor_seconds(shape, tokens, peaks)
            x, ids, wt, w = inputs[0]
            want = call(x, ids, wt, w.w13, w.w2)
            for label, tiles in (("now", None), ("S44", Specialised(4,4)), ("S34", Specialised(3,4))):
                try:
                    got = call(x, ids, wt, w.w13, w.w2, tiles=tiles)
                    e = ((got.double()-want.double()).abs().max()/want.double().abs().max()).item()
                    t = graph_seconds([lambda i=i: call(i[0], i[1], i[2], i[3].w13, i[3].w2, tiles=tiles) for i in inputs], replays=9)
                    save(dict(kind="time", shape=name, tokens=tokens, variant=label, us=t*1e6, ratio=t/floor, error=e))
                except Exception as err:
                    save(dict(kind="time", shape=name, tokens=tokens, variant=label, failed=repr(err)[:300]))
            if tokens >= 512:
                k = shape.top_k
                h = torch.randn(tokens*k, shape.inter, device="cuda", dtype=torch.bfloat16); y = torch.empty(tokens*k, shape.hidden, device="cuda", dtype=torch.bfloat16)
                act = (0,1.0,0.0,None,False,None,None)
                orders = [order_slots(i[1], shape.experts, 128) for i in inputs]
                kw = dict(layout=0, activation=act, top_k=k)
                parts = {"order": [lambda i=i: order_slots(i[1], shape.experts, 128) for i in inputs],
                    "up": [lambda i=i, o=o: hopper.product(i[0], i[3].w13, None, i[2], o, h, up=True, weighted=False, **kw) for i, o in zip(inputs, orders)],
                    "down": [lambda i=i, o=o: hopper.product(h, i[3].w2, None, i[2], o, y, up=False, weighted=True, **kw) for i, o in zip(inputs, orders)]}
                for part, calls in parts.items():
                    t = graph_seconds(calls, replays=7)
                    fl = tokens*k*shape.hidden*shape.inter*(4 if part == "up" else 2)
                    save(dict(kind="part", shape=name, tokens=tokens, part=part, us=t*1e6, tflops=None if part == "order" else fl/t/1e12))
        del copies
