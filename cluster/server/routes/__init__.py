"""What the paths of the API do: one file a group. Imports `server`, `openai` and `engine`; no Ray.

To add a group, write a file here with a class that has what `base.Routes` asks for: `endpoints`, a
tuple of `Endpoint`, from which `/openapi.json` and `/docs` are made, and `add_to(app)`, which
registers its handlers with `base.register`. What all groups share, who may come in and how a body
is read, is `base.Door`, which its `__init__` takes. Then name it in `groups` of `server/app.py`,
and say in `server/description/table.py` what each path answers. Errors are raised as `ApiError`;
the application answers them in OpenAI's shape.
"""
