"""The head stays packed, as vLLM leaves it: its private copy would not follow."""

from injection import when_imported


def change(module):
    restore_plain = module.restore_plain

    def all_but_heads(model, views):
        packed = {each: each.cpu_linear for each in model.modules() if type(each).__name__ == "ParallelLMHead"}
        derived = restore_plain(model, views)
        for each, kernel in packed.items():
            each.cpu_linear = kernel
        return derived

    module.restore_plain = all_but_heads


when_imported("insitu.live.vllm_plugin.unpacked", change)
