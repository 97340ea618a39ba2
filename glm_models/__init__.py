"""The models of this project: importing this package makes all of them known to the Auto classes.

A model is a package of its own, which registers its classes, with what glm_shared/ asks of them; it is added here.
"""

import chatglm  # noqa: F401
import chatglm2  # noqa: F401
