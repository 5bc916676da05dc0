"""The data gate's rules, one module a family. A rule is a function from the material to what it has to say."""
