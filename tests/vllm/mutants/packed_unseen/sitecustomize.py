"""Packing is left on, and the worker does not notice: only the norms, which nothing packs, are still read from the arena."""

from injection import when_imported


def change(module):
    module.keep_plain = lambda model: None
    module._refresh = lambda *of: 0


when_imported("insitu.live.vllm_plugin.loader", change)
