"""Hidden states kept between forwards, so that a change in layer l costs only the layers from l on.

Searches and maps ask one question many times: what is the loss of this model on this text if some
experts are hidden, merged or replaced? Candidates share most of their first layers. A cache keeps
what a batch looks like in front of the experts of a layer, and a forward of the next candidate
begins there::

    cache = PrefixCache(model, batches, budget="1GiB")
    plain = cache.loss()
    for expert in range(8):
        with hidden(model, "model.layers.3.mlp", expert):  # yours: changes the live model
            loss = cache.loss({"model.layers.3.mlp": expert})

The caller changes the model and says what it changed: a name inside a layer -> any hashable tag,
equal only where the layer computes the same. What is not named is as it was when the cache was
made. Changes may touch routers and experts and whatever runs behind them in their layer.

Results are bit for bit those of a whole forward: it is the model's own forward that runs, with the
modules that are skipped standing in for themselves. Where a family passes something around its
layers, so that this would not be exact, a check on a few tokens finds it, and those layers are run.

Pure functions of a model and its batches: no trainer, no ranks.
"""

from lit_moe.prefix.cache import PrefixCache as PrefixCache
