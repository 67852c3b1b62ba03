"""What a framework needs beside its own calls. One module per framework, which alone imports it."""
