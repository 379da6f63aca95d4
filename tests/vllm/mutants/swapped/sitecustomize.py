"""The layout gives k the place of v, and v that of k: where both have one shape, everything still fits."""

import dataclasses

from injection import when_imported


def change(module):
    derive = module.derive

    def swapped(*args, **options):
        found = {slot.name: slot for slot in derive(*args, **options)}
        for name in [name for name in found if ".k_proj." in name]:
            k, v = found[name], found[name.replace(".k_proj.", ".v_proj.")]
            found[k.name] = dataclasses.replace(k, offset=v.offset)
            found[v.name] = dataclasses.replace(v, offset=k.offset)
        return sorted(found.values(), key=lambda slot: slot.offset)

    module.derive = swapped


when_imported("insitu.live.weights.layout", change)
