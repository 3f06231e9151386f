"""Run configurations as YAML files; `lm train --list-presets` shows them."""
