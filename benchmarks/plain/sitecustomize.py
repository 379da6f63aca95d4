"""On PYTHONPATH of a vLLM: unpacked weights and nothing else of insitu, the fair baseline for what the plugin costs."""

import importlib.util
import sys


class _Finder:
    """Changes one module as soon as it is imported, and leaves every other alone."""

    def find_spec(self, name, path=None, target=None):
        if name != "vllm.model_executor.model_loader.default_loader":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_change(module):
            execute(module)
            change(module)

        spec.loader.exec_module = execute_and_change
        return spec


def change(module):
    from insitu.live.vllm_plugin.unpacked import keep_plain, restore_plain

    load_weights, load_model = module.DefaultModelLoader.load_weights, module.DefaultModelLoader.load_model

    def plain_weights(self, model, model_config):
        load_weights(self, model, model_config)
        keep_plain(model)

    def plain_model(self, *args, **kwargs):
        model = load_model(self, *args, **kwargs)
        restore_plain(model, dict(model.named_parameters()))
        return model

    module.DefaultModelLoader.load_weights, module.DefaultModelLoader.load_model = plain_weights, plain_model


sys.meta_path.insert(0, _Finder())
