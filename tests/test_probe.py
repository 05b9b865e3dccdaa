import jax, chex, numpy as np
def cfg(tiny_config, n, scope="layer", e=4):
    return tiny_config(routing={"experts": e, "scope": scope}, train={"devices": n, "label_smoothing": .1}, model={"dropout": .2},
      data={"crop_padding": 1, "flip": True}, optim={"clip_norm": .5})
def test_a(tiny_config, tiny_split, training):
    for scope in ("shared", "layer"):
        res = []
        for n in (1, 2, 4):
            t = training(cfg(tiny_config, n, scope), tiny_split())
            m = t.run(5)
            res.append((jax.device_get(t.state), m))
        for s, m in res[1:]:
            print(scope, max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(s), jax.tree.leaves(res[0][0]))), max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(m), jax.tree.leaves(res[0][1]))))
        print(m)
